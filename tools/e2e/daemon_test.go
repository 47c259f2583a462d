package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

const exitNoDaemon = 8

func init() { codes[exitNoDaemon] = "no_daemon" }

// host is a daemon with a configuration and a state of its own.
type host struct {
	t      testing.TB // whose processes they are: a part of a test ends before them
	x      *tool
	dir    string
	socket string
	d      *started // nil: it does not run
}

func newHost(t testing.TB, config string) *host {
	t.Helper()
	x := newTool(t)
	dir := filepath.Dir(x.bin)
	h := &host{t: t, x: x, dir: dir, socket: filepath.Join(dir, "d.sock")}
	text := fmt.Sprintf("read_socket = %q\nstate_dir = %q\npolicy_dir = %q\n%s\n[defaults]\nstore = %q\n",
		filepath.Join(dir, "r.sock"), filepath.Join(dir, "state"), filepath.Join(dir, "policies"), config, x.store)
	if err := os.WriteFile(h.config(), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.kill(t, unix.SIGKILL) })
	return h
}

func (h *host) config() string { return filepath.Join(h.dir, "daemon.toml") }

// start runs the daemon, and returns when it answers.
func (h *host) start(t testing.TB, more ...string) {
	t.Helper()
	h.d = h.x.start(h.t, append([]string{"daemon", "--config", h.config(), "--socket", h.socket}, more...)...)
	within(t, time.Minute, "a daemon that answers", func() bool { return h.run(t, "vms", "--json").code == exitOK })
}

// kill ends it, if it runs.
func (h *host) kill(t testing.TB, sig unix.Signal) (r result) {
	t.Helper()
	if h.d == nil {
		return r
	}
	h.d.signal(sig)
	r = h.d.wait(t, time.Minute)
	h.d = nil
	if t.Failed() {
		t.Logf("the daemon said: %s", r)
	}
	return r
}

func (h *host) run(t testing.TB, args ...string) result {
	t.Helper()
	return h.x.run(t, append(args, "--socket", h.socket)...)
}

func (h *host) json(t testing.TB, out any, args ...string) {
	t.Helper()
	h.x.json(t, out, append(args, "--socket", h.socket)...)
}

func (h *host) fails(t testing.TB, code int, words []string, args ...string) {
	t.Helper()
	h.x.fails(t, code, words, append(args, "--socket", h.socket)...)
}

// vms are the VMs by name.
func (h *host) vms(t testing.TB) map[string]statusView {
	t.Helper()
	var l struct{ VMs []statusView }
	h.json(t, &l, "vms")
	m := map[string]statusView{}
	for _, v := range l.VMs {
		m[v.VM] = v
	}
	return m
}

// wait waits until what vms lists is as wanted.
func (h *host) wait(t testing.TB, what string, ok func(map[string]statusView) bool) map[string]statusView {
	t.Helper()
	return hasBecome(t, 3*time.Minute, what, func() (map[string]statusView, bool) { return h.vms(t), true }, ok)
}

// guests starts small VMs at once.
func guests(t testing.TB, prefix string, n int) []*vmtest.VM {
	t.Helper()
	var list []*vmtest.VM
	for i := range n {
		v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 32, WSMiB: 4, Rate: 500, Idle: true, Name: fmt.Sprintf("%s%d", prefix, i)})
		list = append(list, v)
	}
	wantAlive(t, list)
	return list
}

// wantAlive fails unless every guest runs on. They are waited for together: each says what it
// does about once a second.
func wantAlive(t testing.TB, list []*vmtest.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for _, v := range list {
		wg.Go(func() {
			if _, err := v.AwaitProgress(ctx, 20); err != nil {
				t.Errorf("guest of pid %d: %v", v.PID(), err)
			}
		})
	}
	wg.Wait()
}

// TestDaemon: VMs are protected by a daemon; it is killed, and the next one has them
// again, without anybody's doing.
func TestDaemon(t *testing.T) {
	h := newHost(t, "")
	x := h.x
	h.fails(t, exitNoDaemon, nil, "vms")
	h.fails(t, exitNoDaemon, nil, "cancel", "g0")
	h.fails(t, exitNoDaemon, nil, "checkpoint", "g0")
	bad := filepath.Join(h.dir, "bad.toml")
	if err := os.WriteFile(bad, []byte("sockett = \"/x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	x.fails(t, exitUsage, []string{"sockett"}, "daemon", "--check", "--config", bad)
	h.start(t)
	h.fails(t, exitBusy, nil, "daemon", "--config", h.config())
	h.fails(t, exitNotFound, nil, "status", "nobody")

	list := guests(t, "g", 2)
	for _, v := range list {
		h.json(t, &struct{}{}, "attach", itoa(v.PID()), "--interval", "300ms", "--keep-last", "2", "--on-death", "restore")
	}
	h.fails(t, exitBusy, []string{"g0"}, "attach", itoa(list[0].PID()))
	both := func(n uint64) func(map[string]statusView) bool {
		return func(m map[string]statusView) bool {
			return len(m) == 2 && m["g0"].Checkpoints >= n && m["g1"].Checkpoints >= n
		}
	}
	h.wait(t, "two checkpoints of each", both(2))
	var c checkpoint
	for end := time.Now().Add(time.Minute); c.ID == "" && time.Now().Before(end); { // the policy may be taking one
		if r := h.run(t, "checkpoint", "g0", "--json"); r.code == exitOK {
			if err := oneObject(r.out, &c); err != nil || c.Pages == 0 || c.QEMUPID != list[0].PID() {
				t.Errorf("%v: %+v", err, c)
			}
		} else if r.code != exitBusy {
			t.Fatalf("%s", r)
		}
	}
	if c.ID == "" {
		t.Error("no checkpoint was taken by order")
	}
	h.fails(t, exitUsage, []string{"--mode"}, "checkpoint", "g0", "--mode", "stop")
	h.json(t, &struct{}{}, "cancel", "g1")
	read := filepath.Join(h.dir, "r.sock")
	x.json(t, &struct{}{}, "status", "g1", "--socket", read)
	x.fails(t, exitRefused, []string{"vms, status and top"}, "cancel", "g1", "--socket", read)
	if r := h.run(t, "top", "--count", "2", "--json"); r.code != exitOK || strings.Count(r.out, "\n") != 2 {
		t.Errorf("%s", r)
	}

	h.kill(t, unix.SIGKILL)
	h.start(t)
	h.wait(t, "both are protected again", both(1))
	wantAlive(t, list)

	h.json(t, &struct{}{}, "detach", "g1")
	if r := h.kill(t, unix.SIGTERM); r.code != exitOK {
		t.Errorf("it does not end in order: %s", r)
	}
	h.start(t)
	h.wait(t, "only g0 is taken up", func(m map[string]statusView) bool { return len(m) == 1 && m["g0"].Checkpoints > 0 })

	var r struct {
		ID    string
		RanNS int64 `json:"ran_ns"`
	}
	x.json(t, &r, "rehearse", "g0", "--store", x.store, "--for", "1s")
	if r.ID == "" || r.RanNS < int64(time.Second) {
		t.Errorf("%+v", r)
	}

	// From now on its monitor is listened to, between checkpoints that are far apart.
	h.json(t, &struct{}{}, "detach", "g0")
	h.json(t, &struct{}{}, "attach", itoa(list[0].PID()), "--interval", "1h", "--on-death", "restore")
	h.wait(t, "its checkpoint", func(m map[string]statusView) bool { return listened(m["g0"]) })
	t.Run("crash", func(t *testing.T) { crashAndRestore(t, h, list[0]) })
}

// listened: the VM has a checkpoint, and its monitor is listened to.
func listened(s statusView) bool {
	return s.Checkpoints > 0 && s.State == "idle" && len(s.Degraded) == 0
}

// crashAndRestore kills the VM, which is brought back and protected again; what then
// ends in order is not.
func crashAndRestore(t *testing.T, h *host, v *vmtest.VM) {
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	m := h.wait(t, "g0 runs as another process and has a checkpoint", func(m map[string]statusView) bool {
		return m["g0"].QEMUPID != v.PID() && listened(m["g0"])
	})
	heir := m["g0"].QEMUPID
	t.Cleanup(func() { _ = unix.Kill(heir, unix.SIGKILL) }) // it may have ended
	if err := unix.Kill(heir, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	m = h.wait(t, "its end is told", func(m map[string]statusView) bool { return m["g0"].State == "ended" })
	if e := m["g0"].Ended; e == nil || e.How != "destroyed" {
		t.Errorf("ended %+v", e)
	}
	// Nobody brings back what was ended on purpose, but who says so.
	h.kill(t, unix.SIGTERM)
	var all struct {
		VMs []struct {
			VM      string
			Code    string
			QEMUPID int `json:"qemu_pid"`
		}
	}
	h.x.json(t, &all, "restore", "--all", "--config", h.config())
	if len(all.VMs) != 1 || all.VMs[0].Code != "refused" {
		t.Errorf("%+v", all)
	}
}

// TestRestoreAll: VMs that were gone without anybody's order are brought back together,
// and the next daemon has them, whatever they are called.
func TestRestoreAll(t *testing.T) {
	h := newHost(t, "")
	h.start(t)
	prefix := strings.Repeat("ü", 127) // as long as a name may be, alike, and more than a file's name when escaped
	list := guests(t, prefix, 2)
	for _, v := range list {
		h.json(t, &struct{}{}, "attach", itoa(v.PID()), "--interval", "300ms", "--keep-last", "2")
	}
	h.wait(t, "checkpoints of both", func(m map[string]statusView) bool {
		return m[prefix+"0"].Checkpoints > 0 && m[prefix+"1"].Checkpoints > 0
	})
	h.kill(t, unix.SIGKILL)
	wantAlive(t, list)
	for _, v := range list {
		if err := v.Crash(); err != nil {
			t.Fatal(err)
		}
	}
	var all struct {
		VMs []struct {
			VM, Code, Message string
			QEMUPID           int `json:"qemu_pid"`
		}
	}
	h.x.json(t, &all, "restore", "--all", "--config", h.config())
	for _, v := range all.VMs {
		t.Cleanup(func() { _ = unix.Kill(v.QEMUPID, unix.SIGKILL) })
		if v.Code != "ok" || v.QEMUPID == 0 {
			t.Errorf("%+v", v)
		}
	}
	if len(all.VMs) != 2 {
		t.Fatalf("%+v", all)
	}
	h.start(t)
	h.wait(t, "both are protected again", func(m map[string]statusView) bool {
		return m[prefix+"0"].Checkpoints > 0 && m[prefix+"1"].Checkpoints > 0
	})
}
