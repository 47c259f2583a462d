package taker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// The test binary plays the child when it is started as one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Verb {
		if err := Main(context.Background(), pretend); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// pretend takes no checkpoint, but does what the VM is called.
func pretend(ctx context.Context, o *Order, lock *os.File, l *Line) (*capture.Result, error) {
	defer lock.Close()
	switch o.Name {
	case "refuse":
		return nil, problem.New(problem.Refused, "protect", "a device", "it cannot be saved: %w", unix.EOPNOTSUPP).WithHint("take it out")
	case "die early":
		fmt.Fprintln(os.Stderr, "first words")
		os.Exit(3)
	}
	if err := l.Ready(ctx); err != nil {
		return nil, err
	}
	switch o.Name {
	case "die":
		// Somebody puts the VM right, and says so, after the child has ended.
		c := exec.Command("sh", "-c", "sleep 0.2; echo put right >&2")
		c.Stderr = os.Stderr
		if err := c.Start(); err != nil {
			return nil, err
		}
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	case "wait":
		o.Capture.Progress(capture.Event{Step: "waiting"})
		<-ctx.Done()
		return nil, problem.New(problem.Cancelled, "checkpoint", o.Name, "%w", ctx.Err())
	}
	st, err := lock.Stat()
	if err != nil {
		return nil, err
	}
	o.Capture.Progress(capture.Event{Step: "mode", Detail: string(o.Capture.Mode), Took: time.Second})
	l.Heard(qmp.Event{Name: "SHUTDOWN", Data: []byte(`{"reason":"guest-shutdown"}`)})
	if o.Paced {
		_ = o.Capture.Pace(ctx, 100, true)
		_ = o.Capture.Pace(ctx, 20, true)
		for range 3 {
			if err := o.Capture.Pace(ctx, 7, false); err != nil {
				return nil, err
			}
		}
		_ = o.Capture.Pace(ctx, 1, true)
	}
	if o.Tracked {
		if err := remark(o); err != nil {
			return nil, err
		}
	}
	return &capture.Result{PID: o.PID, Retaken: []string{"once"}, Notes: []string{fmt.Sprint(st.Size())},
		Manifest: &image.Manifest{ID: "id", VM: o.Name, Hot: image.HotRuns{{First: 3, Pages: 4}}, Blocks: []image.Block{{Name: o.Store, UsedBytes: o.Capture.ArenaBytes}}}}, nil
}

// config is for a child that plays what the VM is called.
func config(t *testing.T, name string) Config {
	t.Helper()
	lock, err := os.CreateTemp(t.TempDir(), "lock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	if _, err := lock.WriteString("held"); err != nil {
		t.Fatal(err)
	}
	return Config{Helper: []string{os.Args[0]}, Lock: lock, Order: Order{PID: os.Getpid(), Name: name, Store: "/store",
		Capture: capture.Options{Mode: capture.COW, ArenaBytes: 5}}}
}

// take is Start, Take and Close.
func take(ctx context.Context, cfg Config) (*capture.Result, string, error) {
	t, err := Start(ctx, cfg)
	if err != nil {
		return nil, "", err
	}
	res, err := t.Take(ctx)
	err = errors.Join(err, t.Close())
	return res, t.Said(), err
}

// What the child is told it has, and what it says arrives.
func TestTaken(t *testing.T) {
	cfg := config(t, "vm")
	var steps, heard []string
	bytes := map[bool]int{}
	asks := make(chan int, 8)
	cfg.Order.Capture.Progress = func(e capture.Event) { steps = append(steps, e.Step+" "+e.Detail+" "+e.Took.String()) }
	cfg.Order.Capture.Pace = func(_ context.Context, n int, urgent bool) error {
		if urgent { // by Take's goroutine
			bytes[true] += n
		} else {
			asks <- n
		}
		return nil
	}
	cfg.Heard = func(e qmp.Event) { heard = append(heard, e.Name+string(e.Data)) }
	res, said, err := take(t.Context(), cfg)
	if err != nil || said != "" {
		t.Fatalf("%v %q", err, said)
	}
	close(asks)
	for n := range asks {
		bytes[false] += n
	}
	m := res.Manifest
	if m.ID != "id" || m.Blocks[0].Name != "/store" || m.Blocks[0].UsedBytes != 5 || len(m.Hot) != 1 || m.Hot[0].Pages != 4 ||
		res.PID != os.Getpid() || res.Retaken[0] != "once" || res.Notes[0] != "4" {
		t.Errorf("%+v %+v", res, m)
	}
	if strings.Join(steps, ";") != "mode cow 1s" || strings.Join(heard, ";") != `SHUTDOWN{"reason":"guest-shutdown"}` {
		t.Errorf("%q %q", steps, heard)
	}
	if bytes[true] != 121 || bytes[false] != 21 {
		t.Errorf("bytes: %v", bytes)
	}
}

func TestRefusal(t *testing.T) {
	_, _, err := take(t.Context(), config(t, "refuse"))
	if !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "it cannot be saved") || !strings.Contains(err.Error(), "take it out") {
		t.Errorf("%v", err)
	}
}

// A child that dies is an error that says how, and what was said; whoever puts the VM
// right afterwards is waited for.
func TestDeath(t *testing.T) {
	for name, words := range map[string][]string{"die early": {"exit status 3", "first words"}, "die": {"killed", "put right"}} {
		_, _, err := take(t.Context(), config(t, name))
		if !problem.Is(err, problem.Failed) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v, want %q", name, err, w)
			}
		}
	}
	cfg := config(t, "vm")
	cfg.Helper = []string{"/nonexistent"}
	if _, err := Start(t.Context(), cfg); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cfg := config(t, "wait")
	cfg.Order.Capture.Progress = func(capture.Event) { cancel() }
	if _, _, err := take(ctx, cfg); !problem.Is(err, problem.Cancelled) {
		t.Errorf("%v", err)
	}
	if _, err := Start(ctx, config(t, "wait")); !problem.Is(err, problem.Cancelled) {
		t.Errorf("with a context that has ended: %v", err)
	}
	// Given up between the two, as by a hook that fails.
	k, err := Start(t.Context(), config(t, "wait"))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
}

// serveTo plays a daemon to a child in this process.
func serveTo(t *testing.T, o Order) (ours *os.File, done chan error) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours = os.NewFile(uintptr(fds[0]), "ours")
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	lock, err := os.CreateTemp(t.TempDir(), "lock")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	done = make(chan error, 1)
	go func() {
		defer conn.Close()
		done <- serve(context.Background(), conn, lock, pretend)
	}()
	if err := json.NewEncoder(ours).Encode(down{Order: &o}); err != nil {
		t.Fatal(err)
	}
	return ours, done
}

// The daemon's death ends a checkpoint as an order to give up does.
func TestDaemonDies(t *testing.T) {
	ours, done := serveTo(t, Order{Protocol: protocol, Name: "wait"})
	if err := json.NewEncoder(ours).Encode(down{Begin: true}); err != nil {
		t.Fatal(err)
	}
	ours.Close()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the child goes on without a daemon")
	}
}

func TestAnotherVersion(t *testing.T) {
	ours, done := serveTo(t, Order{Protocol: protocol + 1, Name: "vm"})
	defer ours.Close()
	var u up
	var err error
	for in := json.NewDecoder(ours); err == nil && !u.last(); { // beats come first
		u = up{}
		err = in.Decode(&u)
	}
	if err != nil || u.Error == nil || u.Error.Code != problem.Busy || !strings.Contains(u.Error.Hint, "restart") {
		t.Errorf("%v %+v", err, u)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A vigil acts after the whole time without a word, and not while nothing is expected.
func TestVigil(t *testing.T) {
	acted := make(chan time.Time, 8)
	v := watchOver(60*time.Millisecond, func() { acted <- time.Now() })
	defer v.close()
	select {
	case <-acted:
		t.Fatal("nothing was expected")
	case <-time.After(150 * time.Millisecond):
	}
	began := time.Now()
	v.expect()
	if at := <-acted; at.Sub(began) < 40*time.Millisecond || !v.lapsed() {
		t.Errorf("after %v", at.Sub(began))
	}
	select {
	case <-acted:
		t.Error("it acted twice")
	case <-time.After(100 * time.Millisecond):
	}
}
