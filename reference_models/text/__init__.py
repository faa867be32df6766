"""Text to ids: WordPiece and byte-pair encoding, from the files that checkpoints come with."""
