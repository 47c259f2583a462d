package api

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// refuser answers every Status with an error.
type refuser struct {
	apipb.UnimplementedAgentServer
	err error
}

func (r *refuser) Status(context.Context, *apipb.StatusRequest) (*apipb.StatusReply, error) {
	return nil, ToStatus(r.err)
}

func TestErrorsCrossTheSocket(t *testing.T) {
	path, err := SelfSocket(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	r := &refuser{}
	s := NewServer()
	apipb.RegisterAgentServer(s, r)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() {
		s.Stop()
		<-served
	}()
	conn, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, want := range []error{
		problem.New(problem.Refused, "set policy", "auto", "it asks for mode %q", "tlc").WithHint("another one"),
		problem.New(problem.Busy, "checkpoint", "VM web", "under way"),
		&problem.Error{Code: problem.Store, Op: "sync"},
		errors.New("plain"),
		context.Canceled,
	} {
		r.err = want
		_, err := apipb.NewAgentClient(conn).Status(t.Context(), &apipb.StatusRequest{})
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
