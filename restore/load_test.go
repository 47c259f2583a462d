package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// monitor plays QEMU's part: each command is answered, after which then is called.
func monitor(t *testing.T, then func(w io.Writer, command string)) *qmp.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		fmt.Fprintln(server, `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}`)
		for dec := json.NewDecoder(server); ; {
			var c struct {
				Execute string
				ID      json.RawMessage
			}
			if dec.Decode(&c) != nil {
				return
			}
			fmt.Fprintf(server, "{\"return\": {}, \"id\": %s}\n", c.ID)
			then(server, c.Execute)
		}
	})
	c, err := qmp.NewClient(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close()
		_ = server.Close()
		wg.Wait()
	})
	return c
}

// TestLoadInterrupted: an interrupt before the guest is told to run ends the load;
// after it, the outcome counts.
func TestLoadInterrupted(t *testing.T) {
	const completed = `{"event": "MIGRATION", "data": {"status": "completed"}, "timestamp": {"seconds": 1, "microseconds": 0}}` + "\n" +
		`{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}` + "\n"
	const failed = `{"event": "MIGRATION", "data": {"status": "failed"}, "timestamp": {"seconds": 1, "microseconds": 0}}` + "\n"
	for name, c := range map[string]struct {
		before bool   // interrupted before
		says   string // after the interrupt
		want   error
	}{
		"before":     {before: true, want: context.Canceled},
		"then runs":  {says: completed},
		"then fails": {says: failed, want: errLoad},
		"then hangs": {want: context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			told := false
			m := monitor(t, func(w io.Writer, command string) {
				if command == "cont" {
					told = true
					cancel()
					_, _ = io.WriteString(w, c.says)
				}
			})
			f, err := newFeed([]byte("stream"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.close()
			if c.before {
				cancel()
			}
			l, err := load(ctx, m, f, true)
			if !errors.Is(err, c.want) || c.want == nil && (err != nil || l.running.IsZero()) {
				t.Errorf("%+v, %v; want %v", l, err, c.want)
			}
			_ = m.Close()
			if told == c.before {
				t.Errorf("told to run: %v", told)
			}
		})
	}
}

// TestFeedSent: a stream larger than its pipe is not sent before somebody reads it.
func TestFeedSent(t *testing.T) {
	f, err := newFeed(make([]byte, 8<<20))
	if err != nil {
		t.Fatal(err)
	}
	if f.write == nil {
		t.Skip("this system's pipes take 8 MiB")
	}
	f.pump()
	if f.sent() {
		t.Error("sent, though nobody has read")
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(f.read, 8<<20)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "all of it was read, so it is sent", f.sent)
	f.close()
}

// TestHangIsLeftAlone: a QEMU that stands still when it is told to run is not ended,
// since it cannot be told how far it came, and its pager goes on without us.
func TestHangIsLeftAlone(t *testing.T) {
	v := vmtest.Start(t, firmwareOnly())
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	o := testOptions(t)
	o.LoadWithin = time.Second
	o.OnPhase = func(p Phase) {
		if p.Name == PhaseArmed {
			if err := unix.Kill(startedIn(o.RunRoot), unix.SIGSTOP); err != nil {
				t.Error(err)
			}
		}
	}
	res, err := Run(t.Context(), st, id, o)
	if res == nil || !errors.Is(err, errTooSlow) || !problem.Is(err, problem.Failed) {
		t.Fatalf("%+v, %v: want the VM and that it took too long", res, err)
	}
	defer killRestored(t, res)
	if err := unix.Kill(res.QEMUPID, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	m, err := vmtest.DialMonitor(t.Context(), res.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Execute(t.Context(), "query-status", nil, nil); err != nil {
		t.Error(err)
	}
	// The pager was let go: it drains, and ends.
	eventually(t, 20*time.Second, "the pager finishes", func() bool {
		_, err := os.Stat(filepath.Join(res.RunDir, "pager.json"))
		return os.IsNotExist(err)
	})
	attached(t, res)
}

// startedIn is the QEMU of the only run directory.
func startedIn(root string) int {
	var s state
	dirs, _ := filepath.Glob(filepath.Join(root, "*", stateName))
	for _, name := range dirs {
		if raw, err := os.ReadFile(name); err == nil {
			_ = json.Unmarshal(raw, &s)
		}
	}
	return s.QEMU.PID
}
