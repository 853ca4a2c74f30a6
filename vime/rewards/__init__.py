"""Rewards of samples: built-in ones by name, plug-ins by `package.module:function`, a server by HTTP."""
