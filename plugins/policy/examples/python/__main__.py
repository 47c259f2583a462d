"""A policy for ckagent in Python: a checkpoint at an interval, later after failures.

It proves that a policy needs nothing but gRPC, TLS and one line on standard output; the
contract is plugins/policy/policy.proto, the rest is in docs/policies.md. build.sh makes
one program of this file and of what protoc makes of the contract.
"""

import base64
import datetime
import os
import sys
import threading
from concurrent import futures

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import policy_pb2 as pb

SECOND = 1_000_000_000
DEFAULTS = {"interval": "900", "longest": "3600"}  # seconds


class Policy:
    """A function of the signals: nothing is remembered between two decisions."""

    def __init__(self):
        self.params = dict(DEFAULTS)

    def describe(self, request, context):
        params = dict(DEFAULTS)
        for name, value in request.params.items():
            if name not in DEFAULTS or not value.isdigit() or not 1 <= int(value) <= 31536000:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"parameter {name}={value}: want {', '.join(DEFAULTS)} in whole seconds")
            params[name] = value
        self.params = params
        return pb.Description(
            name="python", version="1",
            formula="interval, doubled with each failure in a row, at most longest",
            source="exponential backoff",
            params=[pb.Param(name=n, value=v, help="seconds") for n, v in params.items()])

    def decide(self, s, context):
        if not s.last_success_ns and not s.history:
            return pb.Decision(now=True, reason="the first checkpoint")
        failures = 0
        for c in reversed(s.history):
            if c.ok:
                break
            failures += 1
        longest = int(self.params["longest"]) * SECOND
        interval = min(int(self.params["interval"]) * SECOND << min(failures, 32), longest)
        interval = max(interval, s.capabilities.min_interval_ns)
        last = max([s.last_success_ns] + [c.at_ns for c in s.history])
        at = max(last + interval, s.now_ns)
        return pb.Decision(at_ns=at, interval_ns=interval,
                           reason=f"every {interval // SECOND} s; {failures} failures in a row")


def certificate():
    """A certificate for this process alone: the host trusts exactly the one it is told."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.utcnow()
    cert = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1)).not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        .sign(key, hashes.SHA256()))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem, cert


def raw(answer):
    """A method whose request nobody looks at, and whose answer is these bytes."""
    return grpc.unary_unary_rpc_method_handler(answer)


def main():
    directory, client = os.environ.get("PLUGIN_UNIX_SOCKET_DIR"), os.environ.get("PLUGIN_CLIENT_CERT")
    if not directory or not client:
        sys.exit("a policy of ckagent: `ckagent policy install` it; it is not run by hand")
    policy, ended = Policy(), threading.Event()
    key, cert = certificate()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))

    def shutdown(request, context):
        ended.set()
        return b""

    def method(handler, request, response):
        return grpc.unary_unary_rpc_method_handler(handler, request.FromString, response.SerializeToString)

    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler("ckagent.policy.v1.Policy", {
            "Describe": method(policy.describe, pb.DescribeRequest, pb.Description),
            "Decide": method(policy.decide, pb.Signals, pb.Decision)}),
        # grpc.health.v1.HealthCheckResponse{status: SERVING}
        grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": raw(lambda request, context: b"\x08\x01")}),
        grpc.method_handlers_generic_handler("plugin.GRPCController", {"Shutdown": raw(shutdown)}),
    ))
    path = os.path.join(directory, "policy.sock")
    server.add_secure_port("unix:" + path, grpc.ssl_server_credentials(
        [(key, cert.public_bytes(serialization.Encoding.PEM))], client.encode(), require_client_auth=True))
    server.start()
    der = base64.b64encode(cert.public_bytes(serialization.Encoding.DER)).decode().rstrip("=")
    print(f"1|1|unix|{path}|grpc|{der}", flush=True)
    ended.wait()
    server.stop(0.2).wait()


main()
