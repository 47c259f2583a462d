package restore

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
)

// stage is how far a restore came with its guest, as its run directory says it.
type stage string

const (
	stageHeld stage = "held" // QEMU is there, and nobody told it to run the guest
	stageTold stage = "told" // it was, or is about to be; it has not said yet that it does
	stageRuns stage = "runs" // it did; or somebody wanted it paused
)

// askPatience bounds the question to a QEMU that was left behind.
const askPatience = time.Second

// idleVCPU is processor time that a vCPU thread may have used without having run a
// guest: it was started, and given its registers. A guest uses that in no time.
const idleVCPU = 20 * time.Millisecond

// neverRan reports whether the guest of a QEMU has certainly not run: it does not
// now, and its vCPUs have had no processor. Without an answer it may have.
func neverRan(pid int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), askPatience)
	defer cancel()
	c, err := qmp.DialPID(ctx, pid)
	if err != nil {
		return false
	}
	defer c.Close()
	if st, err := vm.ReadStatus(ctx, c); err != nil || st.Running {
		return false
	}
	var cpus []struct {
		ThreadID int `json:"thread-id"`
	}
	if err := c.Execute(ctx, "query-cpus-fast", nil, &cpus); err != nil || len(cpus) == 0 {
		return false
	}
	for _, cpu := range cpus {
		// "time on the processor in ns, time waiting for one, slices"
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + strconv.Itoa(cpu.ThreadID) + "/schedstat")
		if err != nil {
			return false
		}
		used, _, _ := strings.Cut(string(b), " ")
		if ns, err := strconv.ParseInt(used, 10, 64); err != nil || ns > idleVCPU.Nanoseconds() {
			return false
		}
	}
	return true
}
