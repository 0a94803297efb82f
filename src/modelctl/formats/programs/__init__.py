"""Archives of compiled programs: TorchScript, torch.export."""
