package net

import (
	"fmt"
	"io"
	"math"
	stdnet "net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestIdleSlots: pings with known pauses give slots of known number and length.
func TestIdleSlots(t *testing.T) {
	const gap, n = 20 * time.Millisecond, 25
	w := newWire(t, Options{Gap: gap, Notify: true})
	c := w.udp()
	ev, err := w.m.Events()
	if err != nil {
		t.Fatal(err)
	}
	defer ev.Close()
	type found struct {
		begins []time.Duration
		ends   int
	}
	result := make(chan found)
	go func() {
		var f found
		for {
			e, err := ev.Next()
			if err != nil {
				result <- f
				return
			}
			if e.Begins {
				f.begins = append(f.begins, e.Silence)
			} else {
				f.ends++
			}
		}
	}()
	buf := make([]byte, 16)
	// The first packet of all is what silence is measured from.
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(buf); err != nil {
		t.Fatal(err)
	}
	before := w.read()
	var paused time.Duration
	last := time.Now()
	long := 0 // pauses that really were longer than the gap
	for range n {
		time.Sleep(3 * gap)
		if d := time.Since(last); d > gap {
			long++
			paused += d
		}
		for range 5 { // a burst without pauses
			if _, err := c.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
		last = time.Now()
	}
	after := w.read()
	ev.Close()
	f := <-result
	idle := after.Idle - before.Idle
	t.Logf("%d pauses of %v in all: %d slots (%d false), idle %v, told of %d", long, paused, after.Slots-before.Slots, after.FalseSlots, idle, len(f.begins))
	// Neighbour discovery may split a pause now and then.
	if got := int(after.Slots - before.Slots); got < long || got > long+5 {
		t.Errorf("%d slots, want %d", got, long)
	}
	if math.Abs(float64(idle-paused)) > 0.15*float64(paused) {
		t.Errorf("idle %v, paused %v", idle, paused)
	}
	within := 0
	for _, s := range f.begins {
		if s >= gap && s < gap+gap/10 {
			within++
		}
	}
	// On a busy host a timer comes late now and then.
	if within*10 < len(f.begins)*8 {
		t.Errorf("only %d of %d slots were found within 10 %% of the gap: %v", within, len(f.begins), f.begins)
	}
	if f.ends == 0 || after.Lost != 0 {
		t.Errorf("%d ends, %d lost", f.ends, after.Lost)
	}
}

// ping sends one datagram and waits for its echo.
func ping(t testing.TB, c stdnet.Conn) {
	t.Helper()
	buf := make([]byte, 16)
	_, err := c.Write([]byte("ping"))
	if err == nil {
		_, err = c.Read(buf)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// pause lets a time pass to the microsecond: sleeping comes back late, and by how
// much is not known beforehand.
func pause(d time.Duration) {
	end := time.Now().Add(d)
	ts := unix.NsecToTimespec(int64(d * 3 / 4))
	_ = unix.Nanosleep(&ts, nil) // shorter makes the loop longer
	for time.Now().Before(end) {
	}
}

// TestSlotsAreFoundInTime: a slot is told of a gap after the last packet, for short
// gaps as well. By the median, as a host that is busy lets some timers come late.
func TestSlotsAreFoundInTime(t *testing.T) {
	for _, gap := range []time.Duration{time.Millisecond, 5 * time.Millisecond} {
		t.Run(gap.String(), func(t *testing.T) {
			w := newWire(t, Options{Gap: gap, Notify: true})
			c := w.udp()
			ev, err := w.m.Events()
			if err != nil {
				t.Fatal(err)
			}
			defer ev.Close()
			var found []time.Duration
			for len(found) < 40 {
				ping(t, c)
				ev.SetDeadline(time.Now().Add(5 * time.Second))
				for {
					e, err := ev.Next()
					if err != nil {
						t.Fatal(err)
					}
					if e.Begins {
						found = append(found, e.Silence)
						break
					}
				}
			}
			slices.Sort(found)
			within := 0
			for _, s := range found {
				if s >= gap && s <= gap+gap/10 {
					within++
				}
			}
			mid := found[len(found)/2]
			t.Logf("gap %v: found after %v (median), %v to %v; %d of %d within 10 %%", gap, mid, found[0], found[len(found)-1], within, len(found))
			if found[0] < gap || mid > gap+gap/10 {
				t.Errorf("gap %v: found after %v", gap, mid)
			}
		})
	}
}

// TestFalseSlots: pauses just longer than the gap begin slots that are of no use, and
// are counted as such.
func TestFalseSlots(t *testing.T) {
	const gap, n = 20 * time.Millisecond, 20
	w := newWire(t, Options{Gap: gap})
	c := w.udp()
	ping(t, c)
	before, last := w.read(), time.Now()
	var short, long int // pauses that ended within a quarter of the gap after it, or later
	for i := range n {
		if i%2 == 0 {
			pause(gap * 11 / 10)
		} else {
			pause(gap * 2)
		}
		d := time.Since(last)
		ping(t, c)
		if last = time.Now(); d < gap*5/4 {
			short++
		} else {
			long++
		}
	}
	after := w.read()
	slots, wrong := int(after.Slots-before.Slots), int(after.FalseSlots-before.FalseSlots)
	t.Logf("%d short and %d long pauses: %d slots, %d of them false", short, long, slots, wrong)
	// Pauses that end close to the border may fall on either side of it.
	if slots < n-2 || slots > n+2 || wrong < short-2 || wrong > short+2 {
		t.Errorf("%d slots, %d false; %d pauses, %d short", slots, wrong, n, short)
	}
}

// TestIdle: one packet and then nothing is one slot that lasts.
func TestIdle(t *testing.T) {
	const gap = 10 * time.Millisecond
	w := newWire(t, Options{Gap: gap})
	if x := w.read(); x.Slots != 0 || x.PacketsIn != 0 || x.IdleSince != 0 {
		t.Errorf("before the first packet: %+v", x)
	}
	ping(t, w.udp())
	pause(20 * gap)
	x := w.read()
	// Neighbour discovery may speak up in between.
	if x.Slots == 0 || x.Slots > 3 || x.FalseSlots > 1 || x.IdleSince == 0 || x.Requests != 0 {
		t.Errorf("%+v", x)
	}
	if x.LastIn == 0 || x.LastOut == 0 || x.IdleSince < max(x.LastIn, x.LastOut) {
		t.Errorf("last in %v, out %v, idle since %v", x.LastIn, x.LastOut, x.IdleSince)
	}
}

// TestStreaming: a stream without pauses has no idle slot, every byte of it is counted
// as the interface itself counts, and it is one request with one answer.
func TestStreaming(t *testing.T) {
	const size = 48 << 20
	w := newWire(t, Options{Gap: 250 * time.Millisecond})
	addr := w.serve("10.9.0.2:0", func(c stdnet.Conn) {
		if _, err := io.ReadFull(c, make([]byte, 4)); err == nil {
			_, _ = c.Write(make([]byte, size))
		}
	})
	before, counted := w.read(), w.interfaceBytes()
	c := w.dial(addr)
	if _, err := io.WriteString(c, "send"); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, c); err != nil || n != size {
		t.Fatal(n, err)
	}
	c.Close()
	after, end := w.read(), w.interfaceBytes()
	out, want := after.BytesOut-before.BytesOut, end-counted
	t.Logf("%d bytes streamed: %d counted, the interface says %d; %d slots", size, out, want, after.Slots-before.Slots)
	// The last acknowledgements may come between the two looks.
	if out < size || math.Abs(float64(out)-float64(want)) > 2000 {
		t.Errorf("%d bytes counted, the interface says %d", out, want)
	}
	if after.Slots != before.Slots || after.Requests-before.Requests != 1 || after.Answers-before.Answers != 1 {
		t.Errorf("%+v", after)
	}
}

// interfaceBytes is what the interface received, that is, what came from the VM.
func (w *wire) interfaceBytes() (n uint64) {
	w.t.Helper()
	if err := w.host(func() error {
		// Of this thread's namespace, unlike /proc/net and /sys.
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/net/dev", unix.Gettid()))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "tap0:"); ok {
				n, err = strconv.ParseUint(strings.Fields(rest)[0], 10, 64)
				return err
			}
		}
		return os.ErrNotExist
	}); err != nil {
		w.t.Fatal(err)
	}
	return n
}
