"""The WSGI application: `gunicorn wsgi:app`. The configuration is $AIPROXY_CONFIG, else ./config.yaml."""

import os
import sys

from aiproxy.app import create_app
from aiproxy.config import ConfigError, load, path_from

try:
    app = create_app(load(path_from(os.environ)))
except ConfigError as error:
    print(error, file=sys.stderr)
    # gunicorn gives up on 4 (the application does not load); after any other code it would start
    # the worker again for ever.
    sys.exit(4)
