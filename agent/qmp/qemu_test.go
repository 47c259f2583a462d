package qmp

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
)

func qmpAt(path string) []string { return []string{"-qmp", "unix:" + path + ",server=on,wait=off"} }

func TestSession(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "q.sock")
	q := startQEMU(t, "/", sock, nil, append(qmpAt(sock), "-machine", "pc", "-m", "16")...)
	c, err := DialPID(ctx, q.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if v := c.Version(); v.Major < 7 || !v.AtLeast(7, 0) || v.AtLeast(99, 0) {
		t.Errorf("version %+v", v)
	}
	if !slices.Contains(c.Capabilities(), "oob") {
		t.Errorf("capabilities %q", c.Capabilities())
	}
	var st struct {
		Status  string
		Running bool
	}
	if err := c.Execute(ctx, "query-status", nil, &st); err != nil || st.Status != "prelaunch" {
		t.Fatalf("status %+v, %v", st, err)
	}
	text, err := c.HMP(ctx, "info version")
	if err != nil || !strings.Contains(text, c.Version().String()) {
		t.Errorf("hmp: %q, %v", text, err)
	}

	// QEMU's own words survive.
	err = c.Execute(ctx, "device_del", map[string]string{"id": "nope"}, nil)
	qe, ok := errors.AsType[*Error](err)
	if !ok || qe.Class != "DeviceNotFound" || !strings.Contains(qe.Desc, "nope") {
		t.Errorf("device_del: %v", err)
	}
	if err := c.Execute(ctx, "no-such-command", nil, nil); !IsCommandNotFound(err) {
		t.Errorf("unknown command: %v", err)
	}
	// A string QEMU's parser refuses: the error comes back without an id.
	err = c.Execute(ctx, "device_del", map[string]string{"id": "a\uffffb"}, nil)
	if qe, ok := errors.AsType[*Error](err); !ok || !strings.Contains(qe.Desc, "JSON") {
		t.Errorf("unparsable command: %v", err)
	}

	// Several commands in one write, in order, with their events.
	sub := c.Subscribe(16, "STOP", "RESUME")
	defer sub.Close()
	var reqs []*Request
	for _, name := range []string{"cont", "stop", "cont", "query-status", "stop"} {
		r, err := Encode(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		reqs = append(reqs, r)
	}
	calls, err := c.Send(reqs...)
	if err != nil {
		t.Fatal(err)
	}
	var at time.Time
	for i, k := range calls {
		var out any
		if err := k.Wait(ctx, &out); err != nil {
			t.Fatalf("%s: %v", reqs[i].Command(), err)
		}
		if k.Done().Before(at) || k.Done().Before(k.Sent()) {
			t.Errorf("reply %d at %v, before %v", i, k.Done(), at)
		}
		at = k.Done()
	}
	var names []string
	for range 4 {
		e := <-sub.C()
		names = append(names, e.Name)
		if d := e.Received.Sub(e.Timestamp); d < -time.Second || d > 5*time.Second {
			t.Errorf("%s: received %v after it happened", e.Name, d)
		}
	}
	if got := strings.Join(names, " "); got != "RESUME STOP RESUME STOP" {
		t.Errorf("events %s", got)
	}

	// quit: the reply may or may not come, the end is known for what it is.
	if err := c.Execute(ctx, "quit", nil, nil); err != nil && !errors.Is(err, ErrExited) {
		t.Errorf("quit: %v", err)
	}
	<-c.Done()
	err = c.Execute(ctx, "query-status", nil, nil)
	if !errors.Is(err, ErrLost) || !errors.Is(err, ErrExited) || !strings.Contains(err.Error(), "host-qmp-quit") {
		t.Errorf("after quit: %v", err)
	}
	if _, ok := <-sub.C(); ok {
		t.Error("subscription outlives the connection")
	}
}

func TestKilledQEMUIsKnownToHaveExited(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "q.sock")
	q := startQEMU(t, "/", sock, nil, qmpAt(sock)...)
	c, err := DialPID(ctx, q.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := q.cmd.Process.Signal(os.Kill); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if err := c.Err(); !errors.Is(err, ErrExited) || !errors.Is(err, ErrLost) {
		t.Errorf("killed: %v", err)
	}
}

// TestReplyOfManyMiB asks for a schema and, with HMP, for a dump that is far
// beyond what a line scanner takes.
func TestReplyOfManyMiB(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "q.sock")
	startQEMU(t, "/", sock, nil, append(qmpAt(sock), "-machine", "pc", "-m", "16")...)
	c := dial(t, Endpoint{Network: "unix", Address: sock})
	var schema []any
	if err := c.Execute(ctx, "query-qmp-schema", nil, &schema); err != nil || len(schema) < 500 {
		t.Fatalf("schema of %d entries, %v", len(schema), err)
	}
	text, err := c.HMP(ctx, "xp /600000bx 0")
	if err != nil || len(text) < 3<<20 {
		t.Fatalf("dump of %d bytes, %v", len(text), err)
	}
	t.Logf("reply of %d bytes", len(text))
}

// TestBorrowedAndGivenBack: the next client must be served at once, every time,
// even while somebody keeps a duplicate of the socket.
func TestBorrowedAndGivenBack(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "q.sock")
	q := startQEMU(t, "/", sock, nil, qmpAt(sock)...)
	var worst time.Duration
	for range 50 {
		begin := time.Now()
		c, err := DialPID(ctx, q.pid)
		if err != nil {
			t.Fatal(err)
		}
		dup, err := c.DupFile()
		if err != nil {
			t.Fatal(err)
		}
		defer dup.Close()
		// Even with a reply on its way.
		r, _ := Encode("query-commands", nil)
		if _, err := c.Send(r); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		if err := c.Execute(ctx, "query-status", nil, nil); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		worst = max(worst, time.Since(begin))
	}
	t.Logf("slowest connect, negotiate, close: %v", worst)
}

func TestBusy(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "q.sock")
	q := startQEMU(t, "/", sock, nil, qmpAt(sock)...)
	first := dial(t, Endpoint{Network: "unix", Address: sock, PID: q.pid})
	for _, pid := range []int{q.pid, 0} {
		begin := time.Now()
		_, err := Dial(ctx, Endpoint{Network: "unix", Address: sock, PID: pid})
		p, ok := errors.AsType[*problem.Error](err)
		if !ok || p.Code != problem.Busy || !p.Retryable || !errors.Is(err, ErrBusy) {
			t.Fatalf("second client: %v", err)
		}
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("busy reported after %v", d)
		}
		if !strings.Contains(p.Hint, "qmp.test") {
			t.Errorf("the hint does not name us: %s", p.Hint)
		}
		t.Log(err)
	}
	if err := first.Execute(ctx, "query-status", nil, nil); err != nil {
		t.Error(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again := dial(t, Endpoint{Network: "unix", Address: sock, PID: q.pid})
	_ = again
}

// BenchmarkStopCont is a pause that contains nothing, on a real QEMU: both
// commands in one write, from the STOP event to the RESUME event as received,
// and as QEMU's own clock saw it.
func BenchmarkStopCont(b *testing.B) {
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		b.Skip("qemu-system-x86_64 is not installed")
	}
	sock := filepath.Join(b.TempDir(), "q.sock")
	cmd := exec.Command(bin, append(qmpAt(sock), "-machine", "pc", "-m", "16", "-accel", "tcg", "-display", "none", "-nodefaults")...)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	awaitListening(b, cmd.Process.Pid, sock)
	c, err := DialPID(b.Context(), cmd.Process.Pid)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	sub := c.Subscribe(4, "STOP", "RESUME")
	defer sub.Close()
	stop, _ := Encode("stop", nil)
	cont, _ := Encode("cont", nil)
	var seen, own, noted time.Duration
	n := 0
	for b.Loop() {
		if _, err := c.Send(stop, cont); err != nil {
			b.Fatal(err)
		}
		s, r := <-sub.C(), <-sub.C()
		noted += time.Since(r.Received)
		seen += r.Received.Sub(s.Received)
		own += r.Timestamp.Sub(s.Timestamp)
		n++
	}
	b.ReportMetric(float64(seen.Nanoseconds())/float64(n), "ns-pause-received/op")
	b.ReportMetric(float64(own.Nanoseconds())/float64(n), "ns-pause-qemu/op")
	b.ReportMetric(float64(noted.Nanoseconds())/float64(n), "ns-hop/op")
}
