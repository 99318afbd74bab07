"""From files on disk to pixels, parts and clients; knows no network."""
