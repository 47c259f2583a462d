package arena

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLayoutIsStable(t *testing.T) {
	if got := unsafe.Sizeof(slot{}); got != recordBytes {
		t.Fatalf("slot is %d bytes, the peer expects %d", got, recordBytes)
	}
	if unsafe.Offsetof(ringControl{}.tailPage) < 128 {
		t.Fatal("head and tail share a cache line pair")
	}
}

// Two mappings of one memfd, a producer on one and a consumer on the other:
// every run arrives once, in order, with its content, whatever the sizes.
func TestRunsArriveWholeAndInOrder(t *testing.T) {
	producer, f, err := Create([]int{64})
	if err != nil {
		t.Fatal(err)
	}
	defer producer.Close()
	defer f.Close()
	consumer, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()

	const records = 20000
	sent := make(chan error, 1)
	go func() {
		rng := rand.New(rand.NewPCG(1, 2))
		r := producer.Ring(0)
		for i := range uint64(records) {
			n := 1 + rng.IntN(r.MaxReserve())
			if kind := rng.IntN(8); kind < 2 {
				put := func() bool { return r.PublishZero(2, i, uint64(n), ByFault, time.Minute) }
				if kind == 1 {
					put = func() bool { return r.PublishSame(3, i, uint64(n), time.Minute) }
				}
				if !put() {
					sent <- errors.New("no slot within a minute")
					return
				}
				continue
			}
			b, ok := r.Reserve(n, time.Minute)
			if !ok {
				sent <- errors.New("no space within a minute")
				return
			}
			for p := range n {
				binary.LittleEndian.PutUint64(b[p*PageBytes:], i<<16|uint64(p))
				binary.LittleEndian.PutUint64(b[(p+1)*PageBytes-8:], i<<16|uint64(p))
			}
			r.Publish(1, i, uint64(n), ByScan)
		}
		if !r.Finish(time.Minute) {
			sent <- errors.New("no slot for the end")
			return
		}
		sent <- nil
	}()

	r := consumer.Ring(0)
	for i := uint64(0); ; i++ {
		rec, ok, done, err := r.Next(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if done {
			if i != records {
				t.Fatalf("%d records arrived, want %d", i, records)
			}
			break
		}
		if !ok || rec.First != i {
			t.Fatalf("record %d: ok=%v first=%d", i, ok, rec.First)
		}
		if rec.Same != (rec.Block == 3) || (rec.Data != nil) != (rec.Block == 1) || (rec.Origin == ByFault) != (rec.Block == 2) {
			t.Fatalf("record %d: %d pages of block %d, same %v, origin %d, %d bytes", i, rec.Pages, rec.Block, rec.Same, rec.Origin, len(rec.Data))
		}
		for p := range len(rec.Data) / PageBytes {
			want := i<<16 | uint64(p)
			if binary.LittleEndian.Uint64(rec.Data[p*PageBytes:]) != want ||
				binary.LittleEndian.Uint64(rec.Data[(p+1)*PageBytes-8:]) != want {
				t.Fatalf("record %d page %d was overwritten", i, p)
			}
		}
		r.Done()
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
}

// Several records may be read before they are given back, all at once.
func TestRecordsAreGivenBackTogether(t *testing.T) {
	a, f, err := Create([]int{8})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer f.Close()
	r := a.Ring(0)
	for i := range uint64(5) {
		if data, ok := r.Reserve(1, 0); !ok {
			t.Fatal("no room")
		} else {
			data[0] = byte(i)
		}
		r.Publish(0, i, 1, ByFault)
	}
	for i := range uint64(3) {
		if rec, ok, _, err := r.Next(0); err != nil || !ok || rec.First != i || rec.Data[0] != byte(i) {
			t.Fatalf("record %d: %+v %v %v", i, rec, ok, err)
		}
	}
	if free := r.FreePages(); free != 3 {
		t.Errorf("%d pages free before Done", free)
	}
	r.Done()
	r.Done() // nothing was read since
	if free, records := r.FreePages(), r.FreeRecords(); free != 6 || records != len(r.slots)-2 {
		t.Errorf("%d pages and %d of %d records free after Done", free, records, len(r.slots))
	}
	if rec, ok, _, err := r.Next(0); err != nil || !ok || rec.First != 3 {
		t.Errorf("next: %+v %v %v", rec, ok, err)
	}
}

func TestFullRingGivesUpInTime(t *testing.T) {
	a, f, err := Create([]int{4})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer f.Close()
	r := a.Ring(0)
	for range 2 {
		if _, ok := r.Reserve(2, 0); !ok {
			t.Fatal("an empty ring had no room")
		}
		r.Publish(0, 0, 2, ByScan)
	}
	begin := time.Now()
	if _, ok := r.Reserve(1, 20*time.Millisecond); ok {
		t.Fatal("a full ring had room")
	}
	if waited := time.Since(begin); waited < 20*time.Millisecond {
		t.Fatalf("gave up after %v", waited)
	}
	if _, ok, _, err := r.Next(0); !ok || err != nil {
		t.Fatal("the record is not there", err)
	}
	r.Done()
	if _, ok := r.Reserve(2, 0); !ok {
		t.Fatal("what was given back cannot be reserved")
	}
}

// Reserved pages can be published one by one: what the consumer has not taken yet
// is not overwritten, also where zero runs have used up the records.
func TestRecordsAreNeverOverwritten(t *testing.T) {
	a, f, err := Create([]int{64})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer f.Close()
	r := a.Ring(0)
	zeros := uint64(0)
	for r.FreeRecords() > 1 {
		if !r.PublishZero(0, zeros, 1, ByScan, 0) {
			t.Fatal("no slot")
		}
		zeros++
	}
	const n = 8
	take := func(want uint64) {
		t.Helper()
		rec, ok, _, err := r.Next(0)
		if err != nil || !ok || rec.First != want {
			t.Fatalf("record of page %d (%v, %v), want %d", rec.First, ok, err, want)
		}
		r.Done()
	}
	next := uint64(0)
	for {
		if _, ok := r.Reserve(n, 0); ok {
			break
		}
		take(next)
		next++
	}
	for i := range uint64(n) {
		r.Publish(0, zeros+i, 1, ByScan)
	}
	for ; next < zeros+n; next++ {
		take(next)
	}
}

func TestHostileArenaIsRefused(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Write(bytes.Repeat([]byte{0xff}, 3*PageBytes))
	if _, err := Open(f); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("opened garbage: %v", err)
	}

	a, g, err := Create([]int{8})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer g.Close()
	r := a.Ring(0)
	r.put(slot{pages: 9, start: 1, flags: uint32(ByScan)})
	if _, _, _, err := r.Next(0); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("took a record outside the ring: %v", err)
	}
}

// A producer with slack sleeps until there is room for several runs, and is woken
// also when the consumer has taken all there was and that is less.
func TestSlackSparesWakes(t *testing.T) {
	a, f, err := Create([]int{64})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer f.Close()
	r := a.Ring(0)
	r.SetSlack(24)
	fill := func(run int) (n int) {
		for ; ; n++ {
			if _, ok := r.Reserve(run, 0); !ok {
				return n
			}
			r.Publish(0, 0, uint64(run), ByScan)
		}
	}
	take := func() {
		t.Helper()
		if _, ok, _, err := r.Next(0); !ok || err != nil {
			t.Fatal("no record", err)
		}
		r.Done()
	}
	reserved := make(chan bool)
	asleep := func() bool { return atomic.LoadUint32(&r.h.producerWaits) == 1 }
	reserve := func(n int) {
		go func() { _, ok := r.Reserve(n, time.Minute); reserved <- ok }()
		for !asleep() {
			runtime.Gosched()
		}
	}

	if n := fill(8); n != 8 {
		t.Fatalf("%d runs of 8 pages in a ring of 64", n)
	}
	reserve(8)
	for range 3 { // 24 pages: room for the one asked for, but not for the slack
		take()
		if !asleep() {
			t.Fatal("woken too early")
		}
	}
	take()
	if !<-reserved {
		t.Fatal("not woken though there was room for it and the slack")
	}
	r.Publish(0, 0, 8, ByScan)

	// The slack reaches beyond what is in the ring: taking all of it must do. 104 pages
	// were published by then, and the next 32 begin at the ring's start again.
	take()
	if n := fill(8); n != 4 {
		t.Fatalf("%d more runs", n)
	}
	for range 6 {
		take()
	}
	begin := time.Now()
	reserve(32)
	take()
	if !asleep() {
		t.Fatal("woken too early")
	}
	take()
	if !<-reserved || time.Since(begin) > time.Minute/2 {
		t.Fatal("not woken by the last record")
	}
}

// Records that come one by one, faster than a lull, do not wake the consumer one
// by one; a single one and the end arrive all the same.
func TestConsumerIsNotWokenForEachRecord(t *testing.T) {
	a, f, err := Create([]int{4096})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer f.Close()
	r := a.Ring(0)
	const records = 2000
	sent := make(chan bool, 1)
	go func() {
		ok := true
		for i := range uint64(records) {
			for until := time.Now().Add(20 * time.Microsecond); time.Now().Before(until); {
			}
			_, room := r.Reserve(1, time.Minute)
			ok = ok && room
			r.Publish(0, i, 1, ByFault)
		}
		sent <- ok && r.Finish(time.Minute)
	}()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		t.Fatal(err)
	}
	got := uint64(0)
	for {
		rec, ok, done, err := r.Next(10 * time.Second)
		if err != nil || !ok && !done {
			t.Fatalf("record %d: %v, %v", got, ok, err)
		}
		if done {
			break
		}
		if rec.First != got {
			t.Fatalf("record %d came as number %d", rec.First, got)
		}
		got++
		r.Done()
	}
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		t.Fatal(err)
	}
	if !<-sent || got != records {
		t.Fatalf("%d records arrived", got)
	}
	if slept := after.Nvcsw - before.Nvcsw; slept > records/4 {
		t.Errorf("the consumer slept %d times for %d records", slept, records)
	}
}
