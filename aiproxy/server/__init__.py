"""How the service meets the world: Flask's blueprints, gunicorn's processes, the file it is configured by.

Flask and gunicorn are known here and in `app` alone.
"""
