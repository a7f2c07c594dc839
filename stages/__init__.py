"""One Hydra-composed entry point per stage; each says what it reads and writes, and holds no logic of its own."""
