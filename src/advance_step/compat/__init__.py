"""Other libraries' names on our operators: `torch_npu`, real or emulated. Nothing here is imported unasked."""
