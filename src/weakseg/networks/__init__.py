"""Networks: backbones behind one contract, heads and decoders."""
