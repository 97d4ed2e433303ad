"""Envoy in front of a gateway: its bootstrap, and the certificate that it reads again when that changes.

Types and their meaning: https://www.envoyproxy.io/docs/envoy/latest/api-v3/api. There is no admin interface.
"""

from __future__ import annotations

from typing import Any

from .proxy import ERRORS, HIDDEN, Proxy

_TYPE = "type.googleapis.com/envoy.extensions."
_FILTERS = f"{_TYPE}filters"
_BUFFER = 32 * 1024
"""Bytes that a connection may hold back: tokens go on as they come, and a slow reader slows only itself."""
_CLIENT = "remote_address"


def bootstrap(proxy: Proxy, *, certificates: str) -> dict[str, Any]:
    """The document. `certificates`: path of the file with `secrets`."""
    return {
        "node": {"id": "proxy", "cluster": "penstock"},
        "static_resources": {
            "listeners": [_plain(proxy), _secure(proxy, certificates)],
            "clusters": [_gateway(proxy)],
        },
    }


def secrets(proxy: Proxy) -> dict[str, Any]:
    """The certificate, in a file of its own: so Envoy watches its folder, and takes a renewed one."""
    return {
        "resources": [
            {
                "@type": f"{_TYPE}transport_sockets.tls.v3.Secret",
                "name": "certificate",
                "tls_certificate": {
                    "certificate_chain": {"filename": proxy.certificate},
                    "private_key": {"filename": proxy.key},
                    "watched_directory": {"path": proxy.certificate.rpartition("/")[0]},
                },
            }
        ]
    }


def _seconds(value: float) -> str:
    return f"{value:g}s"


def _listener(name: str, proxy: Proxy, port: int, chain: dict[str, Any]) -> dict[str, Any]:
    address: dict[str, Any] = {"address": "::" if proxy.ipv6 else "0.0.0.0", "port_value": port}
    if proxy.ipv6:
        address["ipv4_compat"] = True
    return {
        "name": name,
        "address": {"socket_address": address},
        "per_connection_buffer_limit_bytes": _BUFFER,
        "filter_chains": [chain],
    }


def _manager(proxy: Proxy, filters: list[dict[str, Any]], routes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "penstock",
            # the peer is the client
            "use_remote_address": True,
            "server_header_transformation": "PASS_THROUGH",
            "normalize_path": True,
            "merge_slashes": True,
            "path_with_escaped_slashes_action": "UNESCAPE_AND_REDIRECT",
            "request_headers_timeout": "10s",
            "stream_idle_timeout": _seconds(proxy.idle_timeout),
            "common_http_protocol_options": {
                "idle_timeout": "3600s",
                "headers_with_underscores_action": "REJECT_REQUEST",
            },
            "http2_protocol_options": {
                "max_concurrent_streams": 100,
                "initial_stream_window_size": 65536,
                "initial_connection_window_size": 1048576,
            },
            "access_log": [
                {
                    "name": "envoy.access_loggers.stdout",
                    "typed_config": {"@type": f"{_TYPE}access_loggers.stream.v3.StdoutAccessLog"},
                }
            ],
            "local_reply_config": {"mappers": [_said(status) for status in (429, 502, 503, 504)]},
            "http_filters": [
                *filters,
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": f"{_FILTERS}.http.router.v3.Router"},
                },
            ],
            "route_config": {
                "virtual_hosts": [{"name": "gateway", "domains": _domains(proxy), "routes": routes}]
            },
        },
    }


def _domains(proxy: Proxy) -> list[str]:
    return ["*"] if proxy.host is None else [proxy.host, f"{proxy.host}:*"]


def _said(status: int) -> dict[str, Any]:
    """An answer of Envoy's own, in the shape that clients of OpenAI's expect."""
    return {
        "filter": {
            "status_code_filter": {
                "comparison": {
                    "op": "EQ",
                    "value": {"default_value": status, "runtime_key": f"said_{status}"},
                }
            }
        },
        "body_format_override": {
            "text_format_source": {"inline_string": ERRORS.get(status, ERRORS[502]) + "\n"},
            "content_type": "application/json",
        },
    }


def _plain(proxy: Proxy) -> dict[str, Any]:
    redirect = {
        "match": {"prefix": "/"},
        "redirect": {
            "https_redirect": True,
            "port_redirect": proxy.public_port,
            # 308 keeps a POST a POST
            "response_code": "PERMANENT_REDIRECT",
        },
    }
    return _listener("http", proxy, proxy.http_port, {"filters": [_manager(proxy, [], [redirect])]})


def _secure(proxy: Proxy, certificates: str) -> dict[str, Any]:
    hidden = [
        {"match": {"path_separated_prefix": path}, "direct_response": {"status": 404}} for path in HIDDEN
    ]
    passed = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "gateway",
            # an answer may take as long as it moves: `timeout` would count all of it
            "timeout": "0s",
            "idle_timeout": _seconds(proxy.idle_timeout),
            "rate_limits": [{"actions": [{_CLIENT: {}}]}],
        },
        # replaced, not appended to: what the client says of itself is not believed
        "request_headers_to_add": [
            {
                "header": {"key": "X-Forwarded-For", "value": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
    }
    manager = _manager(proxy, [_rate_limit(proxy)], [*hidden, passed])
    chain = {
        "filters": [manager],
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPE}transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "alpn_protocols": ["h2", "http/1.1"],
                    "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                    "tls_certificate_sds_secret_configs": [
                        {
                            "name": "certificate",
                            "sds_config": {
                                "path_config_source": {"path": certificates},
                                "resource_api_version": "V3",
                            },
                        }
                    ],
                },
            },
        },
    }
    return _listener("https", proxy, proxy.https_port, chain)


def _rate_limit(proxy: Proxy) -> dict[str, Any]:
    """A bucket of tokens for each address; those that are used least are forgotten."""
    bucket = {
        "max_tokens": 2 * proxy.rate,
        "tokens_per_fill": proxy.rate,
        "fill_interval": "1s",
    }
    return {
        "name": "envoy.filters.http.local_ratelimit",
        "typed_config": {
            "@type": f"{_FILTERS}.http.local_ratelimit.v3.LocalRateLimit",
            "stat_prefix": "addresses",
            # of all together: what the listener's machine can take, and no address alone may reach
            "token_bucket": {"max_tokens": 10_000, "tokens_per_fill": 10_000, "fill_interval": "1s"},
            "filter_enabled": {"default_value": {"numerator": 100}, "runtime_key": "limit_enabled"},
            "filter_enforced": {"default_value": {"numerator": 100}, "runtime_key": "limit_enforced"},
            "descriptors": [{"entries": [{"key": _CLIENT}], "token_bucket": bucket}],
            "max_dynamic_descriptors": 10_000,
            "response_headers_to_add": [{"header": {"key": "Retry-After", "value": "1"}}],
        },
    }


def _gateway(proxy: Proxy) -> dict[str, Any]:
    host, port = proxy.gateway
    most = {"max_connections": 10_000, "max_requests": 10_000, "max_pending_requests": 10_000}
    endpoint = {"address": {"socket_address": {"address": host, "port_value": port}}}
    return {
        "name": "gateway",
        "type": "STRICT_DNS",
        "connect_timeout": "5s",
        "per_connection_buffer_limit_bytes": _BUFFER,
        # the gateway says itself how much is too much
        "circuit_breakers": {"thresholds": [most]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}upstreams.http.v3.HttpProtocolOptions",
                # below the gateway's own --timeout-keep-alive: a connection is not used as it is being closed
                "common_http_protocol_options": {"idle_timeout": "4s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": "gateway",
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
    }
