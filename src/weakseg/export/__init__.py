"""What leaves a run: model folders, ONNX files, and masks for annotation tools."""
