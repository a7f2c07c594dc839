"""The vision-language models that are trained: loading, chats, image geometry and the capture of their attention."""
