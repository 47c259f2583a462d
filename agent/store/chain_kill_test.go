package store_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/store/storetest"
)

// TestChainSurvivesKills has a process take, merge and remove checkpoints of one chain in
// a real directory, kills it at random instants, and reads every checkpoint there is each
// time. CKAGENT_CHAIN_KILLS is how often; the default is for CI.
func TestChainSurvivesKills(t *testing.T) {
	if os.Getenv("CKAGENT_CHAIN_WORKER") != "" {
		chainWorker(t)
		return
	}
	kills := 12
	if n, err := strconv.Atoi(os.Getenv("CKAGENT_CHAIN_KILLS")); err == nil {
		kills = n
	}
	dir := t.TempDir()
	rnd := rand.New(rand.NewSource(1))
	taken, merged, removed, read := 0, 0, 0, 0
	for kill := range kills {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestChainSurvivesKills$")
		cmd.Env = append(os.Environ(), "CKAGENT_CHAIN_WORKER="+dir, "CKAGENT_CHAIN_SEED="+strconv.Itoa(kill))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It says what it has done; it dies in the middle of what it does next.
		after := 1 + rnd.Intn(25)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			switch word, _, _ := strings.Cut(lines.Text(), " "); word {
			case "taken":
				taken++
			case "merged":
				merged++
			case "removed":
				removed++
			case "FAILED":
				t.Errorf("kill %d: %s", kill, lines.Text())
			default:
				continue
			}
			if after--; after == 0 {
				timer := time.NewTimer(time.Duration(rnd.Intn(8000)) * time.Microsecond)
				<-timer.C
				break
			}
		}
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		cancel()
		read += checkChainDir(t, dir, kill)
		if t.Failed() {
			break
		}
	}
	t.Logf("%d kills: %d checkpoints taken, %d merged, %d removed; %d read back whole", kills, taken, merged, removed, read)
	if taken == 0 || merged == 0 || removed == 0 || read == 0 {
		t.Error("too little was done")
	}
}

// chainWorker goes on with the chain until it is killed. What a checkpoint holds is noted
// beside the store before it is committed.
func chainWorker(t *testing.T) {
	ctx := context.Background()
	dir := os.Getenv("CKAGENT_CHAIN_WORKER")
	seed, _ := strconv.Atoi(os.Getenv("CKAGENT_CHAIN_SEED"))
	s, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	c := storetest.NewChain("a", 1)
	c.Rand = rand.New(rand.NewSource(int64(seed)))
	say := func(what string, err error) {
		if err != nil && !problem.Is(err, problem.NotFound) && !problem.Is(err, problem.Refused) && !problem.Is(err, problem.Busy) {
			fmt.Printf("FAILED %s: %v\n", what, err)
			return
		}
		fmt.Println(what)
	}
	for range 10000 {
		list, err := s.List(ctx)
		if err != nil && !problem.Is(err, problem.NotFound) {
			say("list", err)
		}
		any := func() string { return list[c.Rand.Intn(len(list))].ID }
		switch k := c.Rand.Intn(10); {
		case len(list) == 0 || k < 5:
			say("taken", takeNoted(ctx, s, c, dir))
		case k < 7:
			_, err := s.Merge(ctx, any(), store.MergeOptions{Sparse: c.Rand.Intn(2) == 0})
			say("merged", err)
		case k < 8:
			_, err := s.Remove(ctx, any(), false)
			say("removed", err)
		case k < 9:
			_, err := s.ApplyRetention(ctx, "a", 1+c.Rand.Intn(9))
			say("removed", err)
		default:
			_, err := s.GC(ctx, store.GCOptions{})
			say("collected", err)
		}
	}
}

func takeNoted(ctx context.Context, s *store.Store, c *storetest.Chain, dir string) error {
	c.Change()
	txn, err := s.Begin(ctx, c.VM)
	if err != nil {
		return err
	}
	m, err := c.Write(ctx, s, txn, image.WriterOptions{Dedup: c.Rand.Intn(2) == 0, Compress: []string{"none", "s2", "zstd"}[c.Rand.Intn(3)]})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, txn.ID()), c.RAM, 0o600)
	}
	if err == nil {
		err = txn.Commit(ctx, m)
	}
	if err != nil {
		return errors.Join(err, txn.Abort())
	}
	return nil
}

// checkChainDir compares every checkpoint with its note, before and after GC.
func checkChainDir(t *testing.T, dir string, kill int) int {
	t.Helper()
	ctx := context.Background()
	s, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.List(ctx)
	if err != nil && !problem.Is(err, problem.NotFound) {
		t.Fatal(err)
	}
	c := storetest.NewChain("a", 1)
	for _, i := range list {
		data, err := os.ReadFile(filepath.Join(dir, i.ID))
		if errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("kill %d: checkpoint %s exists and was never finished", kill, i.ID)
		}
		c.Want[i.ID] = data
	}
	if len(list) == 0 {
		return 0
	}
	n := c.Check(t, s)
	if _, err := s.GC(ctx, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	if after := c.Check(t, s); after != n || n != len(list) {
		t.Fatalf("kill %d: %d checkpoints, %d after gc, %d listed", kill, n, after, len(list))
	}
	if rep, err := s.GC(ctx, store.GCOptions{}); err != nil || len(rep.Removed) > 0 {
		b, _ := json.Marshal(rep)
		t.Fatalf("kill %d: gc left %s, %v", kill, b, err)
	}
	return n
}
