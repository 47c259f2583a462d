package signals

import (
	"bufio"
	"context"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/replay"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// recordVariable names a directory to record the guests of plugins/policy/replay/testdata
// into, for three minutes each.
const recordVariable = "CKAGENT_SIGNALS_RECORD"

// phases is how long such a guest is busy, and then quiet.
const phases = 45 * time.Second

func record(t testing.TB, v *vmtest.VM, path, length, every string) []*policy.Signals {
	t.Helper()
	var r struct {
		Lines int `json:"lines"`
	}
	if code := run(t, &r, "policy", "record", pidOf(v.PID()), path, "--for", length, "--every", every, "--dirty-every", "1s"); code != 0 {
		t.Fatalf("exit %d", code)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	trace, err := replay.Read(f)
	if err != nil || len(trace) != r.Lines {
		t.Fatalf("%d lines are said, %d are there: %v", r.Lines, len(trace), err)
	}
	return trace
}

// TestRecord: what is recorded of a guest that writes for a second and then does not is
// a trace that can be replayed, and shows it; the real ones are recorded the same way.
func TestRecord(t *testing.T) {
	if dir := os.Getenv(recordVariable); dir != "" {
		t.Run("idle", func(t *testing.T) {
			recordLong(t, dir, "idle", vmtest.Start(t, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 512, Echo: true}))
		})
		t.Run("server", func(t *testing.T) {
			v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 512, SQL: true, Disks: []vmtest.Disk{{FS: "ext4"}}})
			stop := commits(t, v.SQLAddr(), 30)
			recordLong(t, dir, "server", v)
			t.Logf("%d commits", stop())
		})
		t.Run("compute", func(t *testing.T) {
			recordLong(t, dir, "compute", vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 512, WSMiB: 256, Rate: 10000, Append: "burst=45:45"}))
		})
	}
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 16, Rate: 4000, Append: "burst=2:2"})
	path := filepath.Join(t.TempDir(), "trace.jsonl.gz")
	trace := record(t, v, path, "5s", "250ms")
	least, most := math.Inf(1), 0.0
	for _, s := range trace {
		if m := s.GetMemory(); m != nil {
			least, most = min(least, m.GetDirtyPagesPerSecond()), max(most, m.GetDirtyPagesPerSecond())
		}
	}
	last := trace[len(trace)-1]
	if vm := last.GetVm(); vm.GetRamBytes() < 64<<20 || vm.GetUsedBytes() < 16<<20 || vm.GetUsedBytes() > vm.GetRamBytes() || vm.GetVcpus() != 1 || vm.GetAccel() != "tcg" {
		t.Errorf("%v", vm)
	}
	if most < 1000 || most < 2*least || last.GetCpu() == nil || last.GetMemory().GetGPages() <= 0 {
		t.Errorf("from %.0f to %.0f pages/s; at last %v", least, most, last)
	}
	var replayed struct {
		Policies []struct {
			Checkpoints int `json:"checkpoints"`
		}
	}
	if code := run(t, &replayed, "policy", "replay", path, "--mtbf", "1h", "--repeat", "20"); code != 0 || len(replayed.Policies) != 1 || replayed.Policies[0].Checkpoints < 2 {
		t.Errorf("exit %d, %+v", code, replayed)
	}
	if code := run(t, nil, "policy", "record", pidOf(v.PID()), path, "--for", "6s"); code == 0 {
		t.Error("a file that is there is written over")
	}
}

func recordLong(t *testing.T, dir, name string, v *vmtest.VM) {
	trace := record(t, v, filepath.Join(dir, name+".jsonl.gz"), (4 * phases).String(), "2s")
	sampled := 0
	for _, s := range trace {
		if s.GetMemory() != nil {
			sampled++
		}
	}
	if sampled < len(trace)*9/10 {
		t.Errorf("the dirty rate is in %d of %d lines", sampled, len(trace))
	}
}

// commits has a client commit rows, so many a second, in every other phase, until stop is
// called, which says how many there were.
func commits(t *testing.T, addr string, perSecond int) (stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var c net.Conn
	var r *bufio.Reader
	ask := func(command string) (string, error) {
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return "", err
		}
		if _, err := fmt.Fprintln(c, command); err != nil {
			return "", err
		}
		return r.ReadString('\n')
	}
	eventually(t, "the database answers", func() bool {
		var err error
		if c, err = net.DialTimeout("tcp", addr, time.Second); err != nil {
			return false
		}
		r = bufio.NewReader(c)
		_, err = ask("HAVE")
		return err == nil
	})
	n := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for began := time.Now(); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if time.Since(began)/phases%2 == 1 {
				continue
			}
			if _, err := ask(fmt.Sprintf("PUT %d", n+1)); err != nil {
				return
			}
			n++
		}
	})
	return sync.OnceValue(func() int {
		cancel()
		wg.Wait()
		c.Close()
		return n
	})
}
