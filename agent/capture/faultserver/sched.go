package faultserver

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/heartbeat"
)

// Who comes first: whoever the guest waits for (fault threads, in real time), then
// the guest, then what only has to end some time (scanners).
const (
	serverNice     = -10
	backgroundNice = 5
)

// background puts the calling thread, which must be locked, behind the others of
// this process. A preference, not a need.
func background() {
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), backgroundNice)
}

// stepBack lets ordinary threads of this process, as one, come after others, and
// stepForward ends it. Where the kernel groups processes by session (autogroup),
// ours, alone in its session, would otherwise get as much of a processor as all
// threads of QEMU together, whatever the nice values within. Fault threads and
// heartbeat are not concerned. Without the file there are no such groups.
func stepBack()    { setGroupNice(backgroundNice) }
func stepForward() { setGroupNice(0) }

func setGroupNice(n int) {
	_ = os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(n)), 0)
}

// hurry puts the scanners before everybody until each has finished what it is
// about: the guest waits for a page that one of them has claimed, and that one may
// have been sent off its processor in the middle of it.
func (e *syncEngine) hurry() {
	for _, c := range e.scanners {
		if tid := c.tid.Load(); tid != 0 && !c.urgent.Load() {
			heartbeat.RealtimeOf(int(tid))
			// After the deed: what is taken back has been done.
			c.urgent.Store(true)
		}
	}
}

// calm takes back what hurry did; the scanner itself calls it.
func (c *scanner) calm() {
	if c.urgent.Load() && c.urgent.Swap(false) {
		heartbeat.Ordinary()
	}
}
