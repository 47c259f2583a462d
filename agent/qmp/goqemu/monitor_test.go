package goqemu

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	upstream "github.com/digitalocean/go-qemu/qmp"
	"github.com/digitalocean/go-qemu/qmp/raw"
	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/qmp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startQEMU hands QEMU a socket that listens already, so there is nothing to
// wait for, and returns a connected client.
func startQEMU(t *testing.T) *qmp.Client {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	sock := filepath.Join(t.TempDir(), "q.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	_ = l.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(bin, "-machine", "none", "-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-name", "vm1",
		"-chardev", "socket,id=m,fd=3,server=on,wait=off", "-mon", "m,mode=control")
	cmd.ExtraFiles = []*os.File{f}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	for {
		// QEMU may take longer to start than a monitor may take to greet.
		c, err := qmp.Dial(ctx, qmp.Endpoint{Network: "unix", Address: sock, FD: -1})
		if err == nil {
			return c
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

func TestRawCallsAndEvents(t *testing.T) {
	m := New(startQEMU(t))
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	undrained, err := m.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := raw.NewMonitor(m)
	st, err := r.QueryStatus()
	if err != nil || st.Status != raw.RunStatePrelaunch {
		t.Fatalf("status %+v, %v", st, err)
	}
	if name, err := r.QueryName(); err != nil || name.Name == nil || *name.Name != "vm1" {
		t.Errorf("name %+v, %v", name, err)
	}
	if v, err := r.QueryVersion(); err != nil || v.Qemu.Major < 7 {
		t.Errorf("version %+v, %v", v, err)
	}
	for range 20 { // the second stream is never read, and that stalls nothing
		if err := r.Cont(); err != nil {
			t.Fatal(err)
		}
		if err := r.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	var first upstream.Event
	select {
	case first = <-events:
	case <-time.After(10 * time.Second):
		t.Fatal("no event")
	}
	if first.Event != "RESUME" || first.Timestamp.Seconds == 0 {
		t.Errorf("event %+v", first)
	}
	cancel()
	for range events { // ends with its context
	}
	if _, err := r.HumanMonitorCommand("info version", nil); err != nil {
		t.Errorf("hmp: %v", err)
	}
	if err := r.DeviceDel("nope"); err == nil || !strings.Contains(err.Error(), "nope") {
		t.Errorf("QEMU's error: %v", err)
	}
	out, err := m.Run([]byte(`{"execute":"query-name","id":"mine"}`))
	if err != nil || string(out) != `{"return":{"name":"vm1"},"id":"mine"}` {
		t.Errorf("raw reply %s, %v", out, err)
	}
	for _, bad := range []string{"", "{}", `{"execute":7}`} {
		if _, err := m.Run([]byte(bad)); err == nil {
			t.Errorf("command %q accepted", bad)
		}
	}
	if err := m.Disconnect(); err != nil {
		t.Fatal(err)
	}
	for range undrained { // ends with the connection
	}
	if err := m.Connect(); err == nil {
		t.Error("connected after Disconnect")
	}
	if _, err := m.Events(t.Context()); err == nil {
		t.Error("events after Disconnect")
	}
}
