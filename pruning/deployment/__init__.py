"""Networks on disk: tensors with a recipe, ONNX files, torch.export programs."""
