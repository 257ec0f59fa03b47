"""Learned compressors: the network and where its weights come from."""
