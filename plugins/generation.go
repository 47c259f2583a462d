package plugins

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// What a program did wrong; errors about it match one of them.
var (
	ErrStart    = errors.New("the program did not start as a policy")
	ErrParams   = errors.New("the policy does not take these parameters")
	ErrEnded    = errors.New("the program has ended")
	ErrSlow     = errors.New("no answer in time")
	ErrFlood    = errors.New("more output than is bearable")
	ErrAnswer   = errors.New("an answer that is not a decision to act on")
	ErrDeclines = errors.New("the policy answers with an error")
)

// Host is how programs are run.
type Host struct {
	Limits Limits
	// StartTimeout bounds the time from the start of a program to its description.
	StartTimeout time.Duration
	// Confine is told the pid of a program once it runs, to put it into control
	// groups, and returns what undoes that; nil: nothing of the kind.
	Confine func(pid int) (release func())
	// Line is told what a program writes, a few lines a second; nil: nobody is.
	Line func(program, text string)
	// TempDir is where directories for sockets are made; empty: the system's.
	TempDir string

	swept sync.Once // of the directories that dead hosts left there
}

const (
	defaultStartTimeout = 10 * time.Second
	// endGrace is how long a program may take to end by itself.
	endGrace       = time.Second
	maxDescription = 64 << 10
	// maxDir leaves room in a socket's address for the names below.
	maxDir = 107 - len("/plugin-dir4294967295/plugin4294967295")
)

// Generation is a program that was started. Its methods but End may be called by any
// goroutine.
type Generation struct {
	Program     Program
	Params      map[string]string
	Description *policy.Description
	Started     time.Time

	proc *process
	conn *grpc.ClientConn // nil until it shook hands
	api  policypb.PolicyClient
	out  *output
	dir  *socketDir
	wg   sync.WaitGroup
	stop context.CancelFunc // of what reads its output
}

// Start starts a program and has it describe itself. The error says what it did
// instead; nothing is left of it then.
func (h *Host) Start(ctx context.Context, p Program, params map[string]string) (_ *Generation, err error) {
	timeout := h.StartTimeout
	if timeout == 0 {
		timeout = defaultStartTimeout
	}
	limits := h.Limits
	if limits == (Limits{}) {
		limits = DefaultLimits
	}
	sum, err := hex.DecodeString(p.SHA256)
	if err != nil {
		return nil, fmt.Errorf("%w: checksum %q", ErrChecksum, p.SHA256)
	}
	g := &Generation{Program: p, Params: params, Started: time.Now(), proc: newProcess(p.Path, limits, h.Confine)}
	g.out = &output{flood: func() { _ = g.proc.Kill(context.Background()) }}
	if h.Line != nil {
		g.out.line = func(text string) { h.Line(p.Name, text) }
	}
	h.swept.Do(func() { sweepSocketDirs(h.TempDir) })
	if g.dir, err = newSocketDir(h.TempDir); err != nil {
		return nil, err
	}
	if len(g.dir.path) > maxDir {
		return nil, errors.Join(fmt.Errorf("directory %s: its path is too long for sockets in it", g.dir.path), g.dir.remove())
	}
	readCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	g.stop = stop
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	// Every wait below ends with the process.
	unwatch := context.AfterFunc(ctx, func() { _ = g.proc.Kill(context.Background()) })
	defer unwatch()
	if err := g.start(ctx, readCtx, sum, timeout); err != nil {
		gaveUp := ctx.Err()
		_ = g.proc.Kill(context.Background())
		g.End()
		switch {
		case errors.Is(gaveUp, context.Canceled):
			err = fmt.Errorf("%w: %w", gaveUp, err)
		case gaveUp != nil:
			err = fmt.Errorf("%w: %w within %v: %w", ErrStart, ErrSlow, timeout, err)
		case g.out.hasFlooded():
			err = fmt.Errorf("%w: %w: %w", ErrStart, ErrFlood, err)
		case !errors.Is(err, ErrChecksum) && !errors.Is(err, ErrParams):
			err = fmt.Errorf("%w: %w", ErrStart, err)
		}
		return nil, g.quote(err)
	}
	return g, nil
}

// quote adds what the program said in the end.
func (g *Generation) quote(err error) error {
	if text := g.out.last(); text != "" {
		return fmt.Errorf("%w; it said: %s", err, text)
	}
	return err
}

func (g *Generation) start(ctx, readCtx context.Context, sum []byte, timeout time.Duration) error {
	secure := &goplugin.SecureConfig{Checksum: sum, Hash: sha256.New()}
	if same, err := secure.Check(g.Program.Path); err != nil {
		return err
	} else if !same {
		return fmt.Errorf("%w: %s", ErrChecksum, g.Program.Path)
	}
	config := &goplugin.ClientConfig{
		HandshakeConfig:  policy.Handshake,
		Plugins:          goplugin.PluginSet{policy.PluginName: &policy.Plugin{}},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		StartTimeout:     timeout,
		Stderr:           g.out,
		Logger:           hclog.NewNullLogger(),
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: g.dir.path},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, _ string) (runner.Runner, error) {
			g.proc.cmd.Env = cmd.Env
			return g.proc, nil
		},
	}
	// go-plugin's client does the handshake. Calls go through a connection of our
	// own: its Kill and its streams of output wait without a limit.
	addr, err := goplugin.NewClient(config).Start()
	if err != nil {
		return err
	}
	if addr.Network() != "unix" {
		return fmt.Errorf("it listens on %s; want a unix socket", addr.Network())
	}
	if config.TLSConfig.RootCAs == nil {
		return errors.New("it has no certificate: AutoMTLS is required")
	}
	g.conn, err = grpc.NewClient("passthrough:///policy",
		grpc.WithTransportCredentials(credentials.NewTLS(config.TLSConfig)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(policy.MaxMessageBytes), grpc.MaxCallSendMsgSize(policy.MaxMessageBytes)),
		grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", addr.String())
		}))
	if err != nil {
		return err
	}
	g.wg.Go(func() { g.readOutput(readCtx) })
	g.api = policypb.NewPolicyClient(g.conn)
	if err := g.Healthy(ctx); err != nil {
		return err
	}
	d, err := g.api.Describe(ctx, &policypb.DescribeRequest{Params: g.Params})
	if status.Code(err) == codes.InvalidArgument {
		return fmt.Errorf("%w: %s", ErrParams, status.Convert(err).Message())
	}
	if err != nil {
		return g.explain("describe itself", err)
	}
	if err := checkDescription(d); err != nil {
		return err
	}
	g.Description = d
	return nil
}

func checkDescription(d *policy.Description) error {
	if d.GetName() == "" || len(d.GetName()) > 64 || !utf8.ValidString(d.GetName()) {
		return fmt.Errorf("%w: it describes itself without a name", ErrAnswer)
	}
	n := len(d.GetVersion()) + len(d.GetFormula()) + len(d.GetSource())
	for _, p := range d.GetParams() {
		n += len(p.GetName()) + len(p.GetValue()) + len(p.GetHelp())
	}
	if n > maxDescription {
		return fmt.Errorf("%w: a description of %d bytes", ErrAnswer, n)
	}
	return nil
}

// healthService is the name under which go-plugin's servers answer for their health.
const healthService = "plugin"

// Healthy asks the program whether it serves.
func (g *Generation) Healthy(ctx context.Context) error {
	r, err := grpc_health_v1.NewHealthClient(g.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: healthService})
	if err != nil {
		return g.explain("say whether it serves", err)
	}
	if r.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("%w: its health is %v", ErrAnswer, r.GetStatus())
	}
	return nil
}

// Decide asks for a decision that the host can act on, for policy.Deadline at most.
func (g *Generation) Decide(ctx context.Context, s *policy.Signals) (*policy.Decision, error) {
	ctx, cancel := context.WithTimeout(ctx, policy.Deadline)
	defer cancel()
	d, err := g.api.Decide(ctx, s)
	if err != nil {
		return nil, g.explain("decide", err)
	}
	if err := policy.Check(s, d); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	return d, nil
}

// explain says why a call failed.
func (g *Generation) explain(what string, err error) error {
	st := status.Convert(err)
	why := ErrDeclines
	switch st.Code() {
	case codes.DeadlineExceeded, codes.Canceled:
		why = ErrSlow
	case codes.ResourceExhausted:
		why = ErrFlood
	case codes.Internal, codes.Unimplemented:
		why = ErrAnswer
	case codes.Unavailable:
		why = ErrEnded
	}
	if g.out.hasFlooded() {
		why = ErrFlood
	}
	if exit := g.proc.exitStatus(); exit != nil {
		return fmt.Errorf("%w: asked to %s: %s (%w)", why, what, st.Message(), exit)
	}
	return fmt.Errorf("%w: asked to %s: %s", why, what, st.Message())
}

// readOutput reads what the program writes once it serves: go-plugin's servers send
// it through a stream, and a program whose output nobody reads would hang in the end.
func (g *Generation) readOutput(ctx context.Context) {
	stream, err := g.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/plugin.GRPCStdio/StreamStdio")
	if err != nil || stream.SendMsg(&emptypb.Empty{}) != nil || stream.CloseSend() != nil {
		return // not offered
	}
	for {
		var m emptypb.Empty // whose unknown fields are the message's
		if err := stream.RecvMsg(&m); err != nil {
			return
		}
		_, _ = g.out.Write(stdioData(m.ProtoReflect().GetUnknown())) // never fails
	}
}

// stdioData is field 2 of a plugin.StdioData.
func stdioData(b []byte) []byte {
	for len(b) > 0 {
		num, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil
		}
		b = b[n:]
		if num == 2 && kind == protowire.BytesType {
			data, _ := protowire.ConsumeBytes(b)
			return data
		}
		if n = protowire.ConsumeFieldValue(num, kind, b); n < 0 {
			return nil
		}
		b = b[n:]
	}
	return nil
}

// Ended is closed when the process has ended.
func (g *Generation) Ended() <-chan struct{} { return g.proc.ended }

// PID is the process's, 0 when it has ended.
func (g *Generation) PID() int { return g.proc.pid() }

// End asks the program to end, and ends it. No call may be under way. It returns when
// nothing of it is left.
func (g *Generation) End() {
	timer := time.AfterFunc(endGrace, func() { _ = g.proc.Kill(context.Background()) })
	if g.conn != nil && g.proc.pid() != 0 {
		ctx, cancel := context.WithTimeout(context.Background(), endGrace)
		err := g.conn.Invoke(ctx, "/plugin.GRPCController/Shutdown", &emptypb.Empty{}, &emptypb.Empty{})
		cancel()
		// A server that stops at once has no time to answer.
		if c := status.Code(err); err != nil && c != codes.Unavailable && !errors.Is(err, io.EOF) {
			_ = g.proc.Kill(context.Background())
		}
	}
	g.proc.waitIfStarted()
	timer.Stop()
	g.stop()
	if g.conn != nil {
		_ = g.conn.Close() // it has no peer any more
	}
	g.wg.Wait()
	_ = g.dir.remove() // what stays is swept by the next host
}
