package e2e

import (
	"bufio"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// ack is one commit as its client saw it, by the host's clock.
type ack struct {
	id          uint64
	sent, acked time.Time // acked is zero if the answer never came
}

// bank is a client outside the guest, which commits row after row and keeps a log.
type bank struct {
	conn net.Conn
	r    *bufio.Reader

	mu   sync.Mutex
	log  []ack
	done chan struct{} // closed when the connection has ended
}

// dialSQL connects to the guest's database, which may be about to start.
func dialSQL(t testing.TB, addr string) (net.Conn, *bufio.Reader) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-tick.C {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			// The port is QEMU's: only an answer comes from the guest.
			r := bufio.NewReader(conn)
			if _, err = ask(conn, r, "HAVE", 2*time.Second); err == nil {
				return conn, r
			}
			conn.Close()
		}
		if time.Now().After(deadline) {
			t.Fatalf("the database at %s does not answer: %v", addr, err)
		}
	}
}

// ask sends one command and returns the line that answers it.
func ask(conn net.Conn, r *bufio.Reader, command string, limit time.Duration) (string, error) {
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(conn, command); err != nil {
		return "", err
	}
	line, err := r.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

// newBank begins to commit, from id 1 on.
func newBank(t testing.TB, addr string) *bank {
	t.Helper()
	b := &bank{done: make(chan struct{})}
	b.conn, b.r = dialSQL(t, addr)
	go b.work()
	t.Cleanup(b.close)
	return b
}

func (b *bank) work() {
	defer close(b.done)
	for id := uint64(1); ; id++ {
		a := ack{id: id, sent: time.Now()}
		answer, err := ask(b.conn, b.r, fmt.Sprintf("PUT %d", id), 30*time.Second)
		if err == nil && answer == fmt.Sprintf("OK %d", id) {
			a.acked = time.Now()
		}
		b.mu.Lock()
		b.log = append(b.log, a)
		b.mu.Unlock()
		if a.acked.IsZero() {
			return
		}
	}
}

func (b *bank) close() {
	b.conn.Close()
	<-b.done
}

// acks is the log so far.
func (b *bank) acks() []ack {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]ack(nil), b.log...)
}

// await returns when n more commits were acknowledged.
func (b *bank) await(t testing.TB, n int) {
	t.Helper()
	want := len(b.acks()) + n
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); len(b.acks()) < want; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("the database acknowledges nothing more after %d commits", len(b.acks()))
		}
	}
}

// ranges reads the answer to HAVE.
func ranges(t testing.TB, answer string) map[uint64]bool {
	t.Helper()
	list, ok := strings.CutPrefix(answer, "HAVE ")
	if !ok {
		t.Fatalf("answer %q", answer)
	}
	ids := map[uint64]bool{}
	if list == "-" {
		return ids
	}
	for part := range strings.SplitSeq(list, ",") {
		from, to, _ := strings.Cut(part, "-")
		a, err1 := strconv.ParseUint(from, 10, 64)
		b, err2 := strconv.ParseUint(to, 10, 64)
		if err1 != nil || err2 != nil || b < a || b-a > 1<<20 {
			t.Fatalf("answer %q", answer)
		}
		for id := a; id <= b; id++ {
			ids[id] = true
		}
	}
	return ids
}

// pauseOf is when a checkpoint stopped the machine and let it go on, as QEMU stamped
// its own events.
func pauseOf(t testing.TB, m *vmtest.Monitor, since time.Time) (stop, resume time.Time) {
	t.Helper()
	for _, e := range m.Events() {
		if e.At.Before(since) {
			continue
		}
		switch e.Name {
		case "STOP":
			stop = e.At
		case "RESUME":
			resume = e.At
		}
	}
	if stop.IsZero() || !resume.After(stop) {
		t.Fatalf("no pause since %v: stop %v, resume %v", since, stop, resume)
	}
	return stop, resume
}

// TestAcknowledgedCommits: a database in the guest under write load, a client outside
// that logs what was acknowledged and when. Restored after kill -9, every commit that
// was acknowledged before the checkpoint's stop is there, none that was sent after its
// resume is, and the database is whole.
func TestAcknowledgedCommits(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{MemoryMiB: 256, WSMiB: 8, SQL: true, Control: true,
		Disks: []vmtest.Disk{{FS: "ext4", Format: "qcow2"}}})
	control := monitor(t, v.ControlPath())
	b := newBank(t, v.SQLAddr())
	type point struct {
		id           string
		stop, resume time.Time
	}
	var points []point
	for range 2 { // the second copies only what was written since the first
		b.await(t, 60)
		begun := time.Now()
		c := x.checkpoint(t, v.PID(), "--keep-last", "0", "--qmp", v.QMPPath())
		stop, resume := pauseOf(t, control, begun)
		points = append(points, point{c.ID, stop, resume})
	}
	b.await(t, 60)
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	control.Close()
	b.close()
	log := b.acks()
	for _, p := range points {
		dir := t.TempDir()
		r, w := x.restore(t, p.id, v.SerialPath(), "--disk-dir", dir)
		conn, in := dialSQL(t, v.SQLAddr())
		have, err := ask(conn, in, "HAVE", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		ids := ranges(t, have)
		check, err := ask(conn, in, "CHECK", time.Minute)
		if err != nil || check != fmt.Sprintf("CHECK ok rows=%d", len(ids)) {
			t.Errorf("checkpoint %s: %q, %v; it has %d rows", p.id, check, err, len(ids))
		}
		before, after, between := 0, 0, 0
		for _, a := range log {
			switch {
			case !a.acked.IsZero() && a.acked.Before(p.stop):
				before++
				if !ids[a.id] {
					t.Errorf("commit %d, acknowledged %v before the stop, is lost", a.id, p.stop.Sub(a.acked))
				}
			case a.sent.After(p.resume):
				after++
				if ids[a.id] {
					t.Errorf("commit %d, sent %v after the resume, is there", a.id, a.sent.Sub(p.resume))
				}
			default:
				between++
			}
		}
		if before < 60 || after < 50 || between > 5 {
			t.Errorf("the log says little: %d before, %d after, %d around the pause", before, after, between)
		}
		// It goes on where it was.
		next := uint64(len(ids)) + 1
		if answer, err := ask(conn, in, fmt.Sprintf("PUT %d", next), time.Minute); err != nil || answer != fmt.Sprintf("OK %d", next) {
			t.Errorf("a commit after the restore: %q, %v", answer, err)
		}
		conn.Close()
		x.wantDrained(t, r, w, false)
		w.Kill()
		removeLater(r)
		t.Logf("%s: %d commits acknowledged before the stop, all there; %d sent after the resume, none there; pause %v", p.id, before, after, p.resume.Sub(p.stop))
	}
	// The second volume holds what was written since the first, and needs it.
	if m := x.manifest(t, points[1].id); len(m.Disks) != 1 || len(m.Disks[0].Volumes) != 2 ||
		m.Disks[0].Volumes[1].Name != filepath.Base(x.volume(t, points[0].id)) {
		t.Errorf("the second checkpoint's disk: %+v", m.Disks)
	}
}

// manifest reads a checkpoint's.
func (x *tool) manifest(t testing.TB, id string) *image.Manifest {
	t.Helper()
	r, err := image.OpenReader(x.dir(t, id))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	return r.Manifest()
}
