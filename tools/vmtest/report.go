package vmtest

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Report is what a guest said about itself, taken from its console.
type Report struct {
	Ticks               uint64 // tick lines seen
	FirstTick, LastTick uint64
	Writes              uint64 // pages written, by the last WS line
	FirstWrites         uint64 // and by the first
	Verified            uint64 // pages read and found right or counted as bad
	Sweeps              uint64 // times the whole working set was verified
	Seq                 uint64 // operations: the sequence number of the last write
	Late                uint64 // pages the guest gave up on because it was starved
	Bad                 uint64 // broken invariants the guest found
	Details             []string
	MonoUS              uint64 // the guest's clock in the last WS line
	Ready               bool
	WSPages             uint64
	LongestGap          time.Duration // of the spinning CPU, by the guest's own clock
	FilesWrote          uint64
	FilesBad            uint64
	LogStarted          uint64 // record of the disk log whose write began last
	LogSynced           uint64 // the last one that the disk is said to hold
	LogVerified         uint64 // records read from the disk
	LogSweeps           uint64 // times all of them were
	LogBad              uint64 // records missing or wrong
	LogCheck            *LogCheck
	EchoBytes           uint64
	Mangled             []string // report lines whose checksum is wrong
	MangledFirst        bool     // the first line is one: where a restored guest goes on in the middle
	SeqErrors           []string // gaps and steps back of numbers
	Trouble             []string // panics, oopses, failures to start
	Stalls              []string // the kernel complaining of a starved CPU
	CorruptOnPurpose    bool     // the negative control has struck
}

// LogCheck is what was found on a disk that a guest only looked at (GD_LOGCHECK).
type LogCheck struct{ First, Last, Records, Bad uint64 }

var (
	checksum = regexp.MustCompile(`^(.*) \*([0-9a-f]{4})$`)
	trouble  = regexp.MustCompile(`Kernel panic|\bBUG\b|Oops|general protection|segfault|^FATAL|I/O error|Call Trace`)
	stalls   = regexp.MustCompile(`soft lockup|rcu.*(stall|starved)|hung_task|blocked for more than|hogged CPU|clocksource.*(skew|unstable)`)
)

// sum is the checksum of a report line (guestd's say).
func sum(text string) string {
	h := uint32(2166136261)
	for i := range len(text) {
		h = (h ^ uint32(text[i])) * 16777619
	}
	return fmt.Sprintf("%04x", (h^h>>16)&0xffff)
}

// maxList bounds the lists of a report: a broken guest says the same forever.
const maxList = 100

func note(list *[]string, format string, args ...any) {
	if len(*list) < maxList {
		*list = append(*list, fmt.Sprintf(format, args...))
	}
}

// ParseReport reads a console log. Only whole lines count.
func ParseReport(log string) Report {
	var r Report
	last := map[string]uint64{}
	grow := func(key string, v uint64) uint64 { // numbers that may never fall
		if old, ok := last[key]; ok && v < old {
			note(&r.SeqErrors, "%s went back from %d to %d", key, old, v)
		}
		last[key] = v
		return v
	}
	first := true
	for {
		line, rest, ok := strings.Cut(log, "\n")
		if !ok {
			return r
		}
		log = rest
		line = strings.TrimRight(line, "\r")
		if trouble.MatchString(line) {
			note(&r.Trouble, "%s", line)
		}
		if stalls.MatchString(line) {
			note(&r.Stalls, "%s", line)
		}
		m := checksum.FindStringSubmatch(line)
		whole := m != nil && sum(m[1]) == m[2]
		if !whole {
			if m != nil || reportWord.MatchString(line) {
				note(&r.Mangled, "%s", line)
				r.MangledFirst = r.MangledFirst || first
			}
			first = false
			continue
		}
		first = false
		r.take(m[1], grow)
	}
}

var reportWord = regexp.MustCompile(`^(TICK|WS|WSREADY|READY|GAP|BAD|FILES|LOG|LOGCHECK|ECHO|INIT) `)

// take reads one whole report line.
func (r *Report) take(text string, grow func(string, uint64) uint64) {
	words := strings.Fields(text)
	if len(words) == 0 {
		return
	}
	field := map[string]string{}
	for _, w := range words[1:] {
		if k, v, ok := strings.Cut(w, "="); ok {
			field[k] = v
		}
	}
	num := func(k string) uint64 {
		n, err := strconv.ParseUint(field[k], 10, 64)
		if err != nil {
			note(&r.SeqErrors, "%q: no number %s", text, k)
		}
		return n
	}
	switch words[0] {
	case "TICK":
		n, err := strconv.ParseUint(strings.Join(words[1:min(2, len(words))], ""), 10, 64)
		if err != nil {
			note(&r.SeqErrors, "%q: no tick number", text)
			return
		}
		if r.Ticks == 0 {
			r.FirstTick = n
		} else if n != r.LastTick+1 {
			note(&r.SeqErrors, "tick %d follows tick %d", n, r.LastTick)
		}
		r.Ticks++
		r.LastTick = n
		grow("mono_us", num("mono_us"))
	case "WS":
		w := grow("w", num("w"))
		if r.Writes == 0 {
			r.FirstWrites = w
		}
		r.Writes, r.Seq, r.Verified = w, grow("seq", num("seq")), grow("v", num("v"))
		r.Sweeps, r.Late, r.Bad = grow("sweeps", num("sweeps")), grow("late", num("late")), grow("bad", num("bad"))
		r.MonoUS = num("mono_us")
	case "WSREADY":
		r.WSPages = num("pages")
	case "READY":
		r.Ready = true
	case "GAP":
		r.LongestGap = max(r.LongestGap, time.Duration(num("max_us"))*time.Microsecond)
	case "BAD":
		note(&r.Details, "%s", text)
	case "CORRUPT":
		r.CorruptOnPurpose = true
	case "FILES":
		if len(words) > 1 && words[1] != "ready" {
			r.FilesWrote = grow("files", num("wrote"))
		}
		r.FilesBad = num("bad")
	case "LOG":
		r.LogStarted, r.LogSynced = grow("started", num("started")), grow("synced", num("synced"))
		r.LogVerified, r.LogSweeps, r.LogBad = grow("log v", num("v")), grow("log sweeps", num("sweeps")), grow("log bad", num("bad"))
	case "LOGCHECK":
		r.LogCheck = &LogCheck{num("first"), num("last"), num("records"), num("bad")}
	case "ECHO":
		if len(words) > 1 && words[1] != "ready" {
			r.EchoBytes = grow("echo", num("bytes"))
		}
	}
}

// Check is nil if every invariant held: nothing bad, no number lost, repeated or
// gone back, no report mangled (but the first line, which may be the second half
// of one that a checkpoint cut in two), no kernel trouble.
func (r Report) Check() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if r.Bad > 0 || len(r.Details) > 0 {
		fail("guest memory is wrong in %d places: %s", r.Bad, strings.Join(r.Details, "; "))
	}
	if r.FilesBad > 0 {
		fail("%d guest files are wrong: %s", r.FilesBad, strings.Join(r.Details, "; "))
	}
	if r.LogBad > 0 {
		fail("%d records of the disk log are missing or wrong: %s", r.LogBad, strings.Join(r.Details, "; "))
	}
	if len(r.SeqErrors) > 0 {
		fail("numbers out of sequence: %s", strings.Join(r.SeqErrors, "; "))
	}
	if n := len(r.Mangled); n > 1 || n == 1 && !r.MangledFirst {
		fail("%d mangled lines: %q", n, r.Mangled)
	}
	if len(r.Trouble) > 0 {
		fail("the guest is in trouble: %s", strings.Join(r.Trouble, "; "))
	}
	return errors.Join(errs...)
}

// Report is what this machine's guest said so far.
func (v *VM) Report() Report { return ParseReport(v.Serial()) }

// Invariants is Report, and fails the test that started the machine if an
// invariant is broken. Without a test, call Check on what it returns.
func (v *VM) Invariants() Report {
	r := v.Report()
	if v.tb != nil {
		v.tb.Helper()
		if err := r.Check(); err != nil {
			v.tb.Errorf("vmtest: pid %d: guest invariants: %v", v.pid, err)
		}
	}
	return r
}

// AwaitProgress waits until the guest has written at least n more pages than it
// has now and returns the report then.
func (v *VM) AwaitProgress(ctx context.Context, n uint64) (Report, error) {
	return v.await(ctx, func(old, now uint64) bool { return now >= old+n }, "w")
}

// AwaitLogSweeps waits until the guest has read its whole disk log n more times from
// the disk.
func (v *VM) AwaitLogSweeps(ctx context.Context, n uint64) (Report, error) {
	return v.awaitNumber(ctx, "LOG", "sweeps", func(old, now uint64) bool { return now >= old+n+1 })
}

// AwaitLog waits until n more records of the disk log are safe.
func (v *VM) AwaitLog(ctx context.Context, n uint64) (Report, error) {
	return v.awaitNumber(ctx, "LOG", "synced", func(old, now uint64) bool { return now >= old+n })
}

// AwaitSweeps waits until the guest has verified its whole working set n more
// times from start to end; n+1 sweep ends are waited for, as one is under way.
func (v *VM) AwaitSweeps(ctx context.Context, n uint64) (Report, error) {
	return v.await(ctx, func(old, now uint64) bool { return now >= old+n+1 }, "sweeps")
}

func (v *VM) await(ctx context.Context, enough func(old, now uint64) bool, key string) (Report, error) {
	return v.awaitNumber(ctx, "WS", key, enough)
}

func (v *VM) awaitNumber(ctx context.Context, word, key string, enough func(old, now uint64) bool) (Report, error) {
	re := regexp.MustCompile(`^` + word + ` .*\b` + key + `=(\d+)`)
	// The last value so far is where we start from; a guest that has not said
	// anything yet starts from zero.
	var old, now uint64
	for line := range strings.Lines(v.Serial()) {
		if m := re.FindStringSubmatch(line); m != nil {
			old, _ = strconv.ParseUint(m[1], 10, 64)
		}
	}
	err := v.watch(ctx, v.SerialSize(), func(line []byte) bool {
		if m := re.FindSubmatch(line); m != nil {
			now, _ = strconv.ParseUint(string(m[1]), 10, 64)
		}
		return enough(old, now)
	})
	if err != nil {
		return v.Report(), fmt.Errorf("wait for %s %s of pid %d to go on from %d (now %d): %w", word, key, v.pid, old, now, err)
	}
	return v.Report(), nil
}
