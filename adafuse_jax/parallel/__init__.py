"""Arrays over several devices: logical axes, the rules that map them to mesh axes, and meshes."""
