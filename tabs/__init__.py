"""The tabs of the app, one to a file, and what they share. With app.py this is the room above all others."""
