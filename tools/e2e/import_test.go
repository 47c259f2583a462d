package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// imported is what import reports.
type imported struct {
	ID          string   `json:"id"`
	VM          string   `json:"vm"`
	Machine     string   `json:"machine"`
	RAMBytes    uint64   `json:"ram_bytes"`
	ResentPages uint64   `json:"resent_pages"`
	UnsentPages uint64   `json:"unsent_pages"`
	Notes       []string `json:"notes"`
}

// TestImport has QEMU write a running guest into a file, as somebody would who does
// not know ckagent, and restores that lazily.
func TestImport(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "boots guests")
	}
	for _, c := range []struct {
		name, uri string
		config    vmtest.Case
	}{
		{"qemu 7.2", "exec:cat > %s", vmtest.Case{Config: vmtest.Config{Machine: "pc", MemoryMiB: 192, WSMiB: 16, SweepMS: 500, Rate: 20000, VirtioDevices: 6, Control: true}}},
		{"qemu 10", "file:%s", caseOf(t, "qemu10-q35")},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := c.config.Prepare(t)
			cfg.MemoryMiB, cfg.Control = 192, true
			x := newTool(t)
			v := vmtest.Start(t, cfg)
			v.WaitSweeps(t, 1)
			dir := t.TempDir()
			stream, cmdline := filepath.Join(dir, "stream"), filepath.Join(dir, "cmdline")
			raw, err := os.ReadFile("/proc/" + itoa(v.PID()) + "/cmdline")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(cmdline, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			migrate(t, monitor(t, v.ControlPath()), fmt.Sprintf(c.uri, stream))
			if err := v.Crash(); err != nil {
				t.Fatal(err)
			}
			var i imported
			x.json(t, &i, "import", stream, "--store", x.store, "--argv-from", cmdline)
			if i.VM != v.Config().Name || i.UnsentPages != 0 || i.RAMBytes < 192<<20 || strings.Contains(i.Machine, "unknown") {
				t.Errorf("%+v", i)
			}
			t.Logf("%+v", i)
			r, w := x.restore(t, i.VM, v.SerialPath())
			if !r.Lazy || r.LazyBytes < 192<<20 {
				t.Errorf("want a lazy restore: %+v", r)
			}
			x.wantDrained(t, r, w, true)
			if err := w.Crash(); err != nil {
				t.Fatal(err)
			}
			if c.uri[0] == 'e' {
				roundTrips(t, x, i, stream, cmdline)
			}
		})
	}
}

func caseOf(t *testing.T, name string) vmtest.Case {
	t.Helper()
	for _, c := range vmtest.Matrix() {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no configuration %s", name)
	return vmtest.Case{}
}

// migrate has QEMU write its state somewhere and returns when it is complete.
func migrate(t *testing.T, m *vmtest.Monitor, uri string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := m.Execute(ctx, "migrate", map[string]string{"uri": uri}, nil); err != nil {
		t.Fatal(err)
	}
	await(t, "the migration ends", func() bool {
		var s struct{ Status string }
		if err := m.Execute(ctx, "query-migrate", nil, &s); err != nil || s.Status == "failed" {
			t.Fatalf("%v, %+v", err, s)
		}
		return s.Status == "completed"
	})
}

// roundTrips exports what was imported, imports that, and so on: every export is the
// same. What is damaged is refused and leaves nothing.
func roundTrips(t *testing.T, x *tool, first imported, stream, cmdline string) {
	t.Helper()
	dir := filepath.Dir(stream)
	export := func(id, format, name string, args ...string) []byte {
		t.Helper()
		path := filepath.Join(dir, name)
		var e exported
		x.json(t, &e, append([]string{"export", id, "--store", x.store, "--format", format, "-o", path}, args...)...)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	once := export(first.ID, "qemu", "once")
	var second imported
	x.json(t, &second, "import", filepath.Join(dir, "once"), "--store", x.store, "--argv-from", cmdline, "--name", "second")
	if second.VM != "second" || second.ResentPages != 0 || second.UnsentPages != 0 || second.RAMBytes != first.RAMBytes {
		t.Errorf("%+v", second)
	}
	if !bytes.Equal(once, export(second.ID, "qemu", "twice")) {
		t.Error("an export of an import of an export differs from it")
	}

	xml := filepath.Join(dir, "xml")
	if err := os.WriteFile(xml, []byte("<domain type='qemu'><name>web</name></domain>\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	x.fails(t, exitRefused, []string{"domain XML", "--xml"}, "export", first.ID, "--store", x.store, "--format", "libvirt", "-o", filepath.Join(dir, "none"))
	save := export(first.ID, "libvirt", "save", "--xml", xml)
	if !bytes.HasPrefix(save, []byte("LibvirtQemudSave")) || !bytes.HasSuffix(save, once) {
		t.Error("a save image is not a head and the stream")
	}
	var third imported
	x.json(t, &third, "import", filepath.Join(dir, "save"), "--store", x.store, "--argv-from", cmdline, "--name", "third")
	if !bytes.Equal(save, export(third.ID, "libvirt", "again")) { // with the recorded XML
		t.Error("a save image of a save image differs from it")
	}

	for name, b := range map[string][]byte{
		"cut in RAM": once[:len(once)/2], "cut in the devices": once[:len(once)-200], "other magic": append([]byte("QEVX"), once[4:]...), "empty": nil,
	} {
		bad := filepath.Join(dir, "bad")
		if err := os.WriteFile(bad, b, 0o600); err != nil {
			t.Fatal(err)
		}
		x.fails(t, exitIntegrity, []string{"whole and uncompressed"}, "import", bad, "--store", x.store, "--argv-from", cmdline, "--name", "bad")
		if t.Failed() {
			t.Logf("with %s", name)
		}
	}
	x.wantOnly(t, first.ID, second.ID, third.ID)
}
