package policy

import (
	"context"
	"io"
	"sync"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// Handshake keeps a program that is not a policy from being taken for one, and a
// policy from being run by hand without a word. It is no secret.
var Handshake = goplugin.HandshakeConfig{
	ProtocolVersion:  1,
	MagicCookieKey:   "CKAGENT_POLICY",
	MagicCookieValue: "v1:5d1b6c0e",
}

// PluginName is the one service a policy program offers.
const PluginName = "policy"

// MaxMessageBytes bounds what either side accepts.
const MaxMessageBytes = 1 << 20

// Serve is the main of a policy program. It returns when the host is gone.
func Serve(make New) {
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: Handshake,
		Plugins:         goplugin.PluginSet{PluginName: &Plugin{New: make}},
		Logger:          hclog.New(&hclog.LoggerOptions{Output: io.Discard}),
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, grpc.MaxRecvMsgSize(MaxMessageBytes))...)
		},
	})
}

// Plugin is the go-plugin side of the contract, for the host and for policies.
type Plugin struct {
	goplugin.NetRPCUnsupportedPlugin
	New New // nil in the host
}

var _ goplugin.GRPCPlugin = (*Plugin)(nil)

// GRPCServer registers the service in a policy's process.
func (p *Plugin) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	policypb.RegisterPolicyServer(s, &server{make: p.New})
	return nil
}

// GRPCClient returns a policypb.PolicyClient in the host.
func (p *Plugin) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return policypb.NewPolicyClient(c), nil
}

// server serves one policy, which Describe makes.
type server struct {
	policypb.UnimplementedPolicyServer
	make New

	mu     sync.Mutex // makes calls one at a time, as Policy promises
	policy Policy
}

func (s *server) Describe(_ context.Context, r *policypb.DescribeRequest) (*policypb.Description, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.make(r.GetParams())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	s.policy = p
	return p.Describe(), nil
}

func (s *server) Decide(_ context.Context, sig *policypb.Signals) (*policypb.Decision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.policy == nil {
		return nil, status.Error(codes.FailedPrecondition, "Decide before Describe")
	}
	d, err := s.policy.Decide(sig)
	if err != nil {
		return nil, status.Error(codes.Unknown, err.Error())
	}
	return d, nil
}
