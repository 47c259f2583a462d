package api

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answerer answers every Status with an error, or with reply.
type answerer struct {
	apipb.UnimplementedAgentServer
	err   error
	reply *apipb.StatusReply
}

func (a *answerer) Status(context.Context, *apipb.StatusRequest) (*apipb.StatusReply, error) {
	return a.reply, ToStatus(a.err)
}

func (a *answerer) Checkpoint(_ *apipb.CheckpointRequest, stream apipb.Agent_CheckpointServer) error {
	return stream.Send(&apipb.CheckpointEvent{Step: "a\xff", Detail: "b"})
}

// served is a client of a server that answers by a.
func served(t *testing.T, a *answerer) apipb.AgentClient {
	t.Helper()
	path, err := SelfSocket(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer()
	apipb.RegisterAgentServer(s, a)
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		<-ended
	})
	conn, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return apipb.NewAgentClient(conn)
}

func TestErrorsCrossTheSocket(t *testing.T) {
	r := &answerer{}
	c := served(t, r)
	for _, want := range []error{
		problem.New(problem.Refused, "set policy", "auto", "it asks for mode %q", "tlc").WithHint("another one"),
		problem.New(problem.Busy, "checkpoint", "VM web", "under way"),
		&problem.Error{Code: problem.Store, Op: "sync"},
		errors.New("plain"),
		context.Canceled,
	} {
		r.err = want
		_, err := c.Status(t.Context(), &apipb.StatusRequest{})
		got := FromStatus("status", err)
		if problem.CodeOf(got) != problem.CodeOf(want) || problem.ExitCode(got) != problem.ExitCode(want) {
			t.Errorf("%v became %v", want, got)
		}
		w, ok := errors.AsType[*problem.Error](want)
		g, _ := errors.AsType[*problem.Error](got)
		if ok && (w.Error() != g.Error() || w.Hint != g.Hint || w.Retryable != g.Retryable) {
			t.Errorf("%#v became %#v", w, g)
		}
	}
	if FromStatus("status", nil) != nil || ToStatus(nil) != nil {
		t.Error("no error became one")
	}
}

// TestTextThatIsNone: what is not UTF-8 costs no answer and no code, and what was answered
// with stays as it is.
func TestTextThatIsNone(t *testing.T) {
	const bad, good = "/srv/b\xfccher", "/srv/b?cher"
	reply := &apipb.StatusReply{Vms: []*apipb.VMStatus{{Vm: "web"}, {Vm: bad, LastError: "ä", Degraded: []string{"x", bad},
		Policy: &apipb.Policy{Trouble: bad, Params: map[string]string{"a": bad, bad: "b", "c": "d"}}}}}
	a := &answerer{reply: reply}
	c := served(t, a)
	r, err := c.Status(t.Context(), &apipb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := &apipb.StatusReply{Vms: []*apipb.VMStatus{{Vm: "web"}, {Vm: good, LastError: "ä", Degraded: []string{"x", good},
		Policy: &apipb.Policy{Trouble: good, Params: map[string]string{"a": good, good: "b", "c": "d"}}}}}
	if !proto.Equal(r, want) {
		t.Errorf("%v", r)
	}
	if reply.Vms[1].Vm != bad || reply.Vms[1].Policy.Params[bad] != "b" {
		t.Errorf("what was answered with was changed: %v", reply)
	}
	if Readable(want) != want {
		t.Error("what is readable was copied")
	}
	a.err = problem.New(problem.Refused, "open", bad, "no %s", bad).WithHint("rm %s", bad)
	_, err = c.Status(t.Context(), &apipb.StatusRequest{})
	e, ok := errors.AsType[*problem.Error](FromStatus("status", err))
	if !ok || e.Code != problem.Refused || e.Object != good || e.Hint != "rm "+good {
		t.Errorf("%#v", e)
	}
	stream, err := c.Checkpoint(t.Context(), &apipb.CheckpointRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if ev, err := stream.Recv(); err != nil || ev.GetStep() != "a?" || ev.GetDetail() != "b" {
		t.Errorf("%v, %v", ev, err)
	}
}

// TestSockets: the socket of a process that is gone, or whose pid is another's now, is
// removed; what is none stays.
func TestSockets(t *testing.T) {
	dir := t.TempDir()
	self, err := SelfSocket(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(self)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if st, err := os.Stat(self); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	for _, name := range []string{"1-99999999.sock", "4194304-1.sock", "notes.txt"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	live, err := Sockets(dir)
	if err != nil || len(live) != 1 || live[0] != self {
		t.Errorf("%v, %v", live, err)
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(left) != 2 {
		t.Errorf("left: %v", left)
	}
	if none, err := Sockets(filepath.Join(dir, "none")); err != nil || none != nil {
		t.Error(none, err)
	}
}

func TestNobodyThere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	if _, err := Dial(t.Context(), path); problem.ExitCode(err) != 8 {
		t.Errorf("%v", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(t.Context(), path); problem.ExitCode(err) != 8 {
		t.Errorf("a socket that was left: %v", err)
	}
}
