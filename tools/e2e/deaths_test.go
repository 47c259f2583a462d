package e2e

import (
	"context"
	"regexp"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// tell gives a command to a machine that may end by it.
func tell(t testing.TB, m *vmtest.Monitor, command string, args any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := m.Execute(ctx, command, args, nil); err != nil {
		t.Logf("%s: %v", command, err)
	}
}

// TestDeaths: five VMs end, each in another way; the daemon tells them apart, and brings
// back the one that crashed, and no other.
func TestDeaths(t *testing.T) {
	h := newHost(t, "[limits]\ncheckpoints = 4\n")
	h.start(t)
	powerButton := func(t *testing.T, _ *vmtest.VM, m *vmtest.Monitor) { tell(t, m, "system_powerdown", nil) }
	kinds := []struct {
		name, onDeath, guest string
		args                 []string
		die                  func(*testing.T, *vmtest.VM, *vmtest.Monitor)
		how, detail          string
	}{
		{"off", "restore", "power=off", nil, powerButton, "poweroff", "its guest shut down"},
		{"quit", "restore", "", nil, func(t *testing.T, _ *vmtest.VM, m *vmtest.Monitor) { tell(t, m, "quit", nil) }, "destroyed", "host-qmp-quit"},
		{"away", "restore", "", nil, func(t *testing.T, _ *vmtest.VM, m *vmtest.Monitor) {
			tell(t, m, "migrate", map[string]string{"uri": "exec:cat >/dev/null"})
			for end := time.Now().Add(time.Minute); state(t, m) != "postmigrate"; {
				if time.Now().After(end) {
					t.Error("it is not migrated within a minute")
					break
				}
			}
			tell(t, m, "quit", nil)
		}, "migrated", "migrated away"},
		{"panics", "restore", "power=panic", []string{"-device", "pvpanic"}, powerButton, "crashed", "its guest panicked"},
		{"killed", "notify", "", nil, func(t *testing.T, v *vmtest.VM, _ *vmtest.Monitor) {
			if err := v.Crash(); err != nil {
				t.Error(err)
			}
		}, "crashed", "killed"},
	}
	vms, monitors := map[string]*vmtest.VM{}, map[string]*vmtest.Monitor{}
	for _, k := range kinds {
		v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 32, WSMiB: 4, Rate: 500, Name: k.name, Control: true, Append: k.guest, Args: k.args})
		vms[k.name], monitors[k.name] = v, monitor(t, v.ControlPath())
		h.json(t, &struct{}{}, "attach", itoa(v.PID()), "--qmp", v.QMPPath(), "--interval", "1h", "--on-death", k.onDeath)
	}
	h.wait(t, "a checkpoint of each", func(m map[string]statusView) bool {
		for _, k := range kinds {
			if !listened(m[k.name]) {
				return false
			}
		}
		return true
	})
	for _, k := range kinds {
		k.die(t, vms[k.name], monitors[k.name])
	}
	back := 0 // the one that was brought back, as soon as there is one
	defer func() {
		if back != 0 {
			_ = unix.Kill(back, unix.SIGKILL)
		}
	}()
	h.wait(t, "four are gone and one is back", func(m map[string]statusView) bool {
		if pid := m["panics"].QEMUPID; pid != vms["panics"].PID() {
			back = pid
		}
		for _, k := range kinds {
			s := m[k.name]
			if k.name == "panics" {
				if s.QEMUPID == vms[k.name].PID() || !listened(s) {
					return false
				}
			} else if s.State != "ended" || s.Ended.How != k.how {
				return false
			}
		}
		return true
	})
	said := h.kill(t, unix.SIGTERM).err
	for _, k := range kinds {
		if !regexp.MustCompile(`a protected VM is gone.*vm"?[=:]"?` + k.name + `\b.*` + k.how + `.*` + regexp.QuoteMeta(k.detail)).MatchString(said) {
			t.Errorf("of %s it did not say: %s, %s", k.name, k.how, k.detail)
		}
	}
	if t.Failed() {
		t.Logf("the daemon said: %s", said)
	}
}
