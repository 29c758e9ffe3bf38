"""The WSGI application: `gunicorn wsgi:app`. The configuration is $AIPROXY_CONFIG, else ./config.yaml."""

import os
import sys

from aiproxy.app import create_app
from aiproxy.config import ConfigError, path_from
from aiproxy.server.reload import LastGood, start

path = path_from(os.environ)
last_good = LastGood.of(os.environ)
try:
    begun = start(path, last_good)
except ConfigError as error:
    print(error, file=sys.stderr)
    # gunicorn gives up on 4 (the application does not load); after any other code it would start
    # the worker again for ever.
    sys.exit(4)
app = create_app(begun.config)
app.extensions["aiproxy"].follow(path, begun, last_good)
