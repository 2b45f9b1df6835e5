"""From a trained DVT to a bundle of engines' graphs: one ONNX file per stage, run and compared before it is done."""
