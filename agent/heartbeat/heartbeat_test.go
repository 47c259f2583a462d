package heartbeat

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// It beats at once and on, while collections stop the world, and ends.
func TestBeatsWhileTheWorldStops(t *testing.T) {
	var beats, last atomic.Int64
	h, err := Start(time.Millisecond, func() { beats.Add(1); last.Store(NowNS()) })
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for beats.Load() < 100 {
		runtime.GC()
		if time.Now().After(deadline) {
			t.Fatalf("%d beats in 10 s", beats.Load())
		}
	}
	if err := h.Stop(); err != nil {
		t.Fatal(err)
	}
	after := beats.Load()
	if age := NowNS() - last.Load(); age < 0 || age > int64(10*time.Second) {
		t.Errorf("the last beat is %d ns old", age)
	}
	if beats.Load() != after {
		t.Error("it beats after Stop")
	}
}
