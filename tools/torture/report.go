package torture

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// tally is one row of the summary.
type tally struct {
	rounds, inPause, exceptions, repeated int
	silence, settled                      time.Duration
	silences                              []time.Duration
}

func (t *tally) add(o Outcome) {
	t.rounds++
	if o.InPause {
		t.inPause++
	}
	if len(o.Exceptions) > 0 {
		t.exceptions++
	}
	if o.Repeated > 0 {
		t.repeated++
	}
	t.settled = max(t.settled, o.Settled)
	t.silence = max(t.silence, o.Silence)
	if o.Silence > 0 {
		t.silences = append(t.silences, o.Silence)
	}
}

func (t *tally) median() time.Duration {
	if len(t.silences) == 0 {
		return 0
	}
	slices.Sort(t.silences)
	return t.silences[len(t.silences)/2]
}

func ms(d time.Duration) string {
	if d == 0 {
		return "-"
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}

// Outcomes reads a file of a Recorder.
func Outcomes(path string) ([]Outcome, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []Outcome
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<22)
	for s.Scan() {
		var o Outcome
		if err := json.Unmarshal(s.Bytes(), &o); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		all = append(all, o)
	}
	return all, s.Err()
}

// table writes one table of tallies by a key, in order of first appearance.
func table(b *strings.Builder, head string, all []Outcome, key func(Outcome) string) {
	rows := map[string]*tally{}
	var order []string
	for _, o := range all {
		k := key(o)
		if k == "" {
			continue
		}
		if rows[k] == nil {
			rows[k] = &tally{}
			order = append(order, k)
		}
		rows[k].add(o)
	}
	slices.SortStableFunc(order, func(a, b string) int { return cmp.Compare(a, b) })
	fmt.Fprintf(b, "| %s | rounds | in the pause | exceptions | silence, median | silence, longest | nothing left after, longest |\n|---|--:|--:|--:|--:|--:|--:|\n", head)
	for _, k := range order {
		t := rows[k]
		fmt.Fprintf(b, "| %s | %d | %d | %d | %s | %s | %s |\n", k, t.rounds, t.inPause, t.exceptions, ms(t.median()), ms(t.silence), ms(t.settled))
	}
	b.WriteString("\n")
}

// Report makes the summary of a results file.
func Report(path string) (string, error) {
	all, err := Outcomes(path)
	if err != nil {
		return "", err
	}
	var harmed, unharmed []Outcome
	var busy, missed, repeated, exceptions, pauses, random, randomPause int
	var tests []Outcome
	for _, o := range all {
		if len(o.Exceptions) > 0 {
			exceptions++
		}
		if o.Repeated > 0 {
			repeated++
		}
		switch {
		case o.Kind == "test":
			tests = append(tests, o)
		case o.Kind == "guest":
		case o.Busy:
			busy++
		case o.Victim == Nobody:
			unharmed = append(unharmed, o)
		case !o.Acted:
			missed++
			if len(o.Exceptions) > 0 {
				harmed = append(harmed, o)
			}
		default:
			harmed = append(harmed, o)
			if o.InPause {
				pauses++
			}
			if o.Kind == "random" || o.Kind == "pause" {
				random++
				if o.InPause {
					randomPause++
				}
			}
		}
	}
	var b strings.Builder
	b.WriteString("# The kill matrix\n\n")
	b.WriteString("Written by `make torture`. Each round harms one process at one instant and then looks, from outside, whether the VM got away unharmed: the guest goes on within 1 s + 30 ms per GiB (heartbeats of its processor, stamped by the host's kernel), no mapping is registered and no page of its RAM marked as write-protected, no descriptor, tracer or stopped thread is left in QEMU, the VM runs, or is paused if it was paused before, no process of ours is left, what is visible in the store verifies and is exactly what it should be, and (sometimes) the next checkpoint succeeds. At the end of each guest it is asked what it found in its own memory.\n\n")
	fmt.Fprintf(&b, "**%d rounds with harm, %d of them between STOP and RESUME; %d at random instants, %d of those between STOP and RESUME. Exceptions: %d.**\n\n", len(harmed), pauses, random, randomPause, exceptions)
	fmt.Fprintf(&b, "Besides: %d instants did not come (the run was over, or the victim not there yet) and passed as unharmed runs; %d runs gave up by themselves before the instant because the host left a helper without processor (exit code 5, nothing held); %d rounds were taken again because a bound was missed while the host kept a thread of the harness itself waiting for more than %v.\n\n", missed, busy, repeated, starvedHost)
	b.WriteString("*Silence* is the longest time without a heartbeat after the harm. *Nothing left after* is when QEMU was first seen free of everything of ours: for an agent that is harmed itself this is bounded as the silence is; where the agent lives it includes its own orderly end. QEMU itself, when stopped, is stopped for " + qemuStopped.String() + ".\n\n")
	isRestore := func(o Outcome) bool { return o.Mode == "lazy" || o.Mode == "eager" }
	isStore := func(o Outcome) bool { return o.Kind == "store" }
	if list := filter(harmed, func(o Outcome) bool { return !isRestore(o) && !isStore(o) && o.Size == "256 MiB" }); len(list) > 0 {
		b.WriteString("## Checkpoints, by victim and action (256 MiB guest)\n\n")
		table(&b, "victim, action", list, func(o Outcome) string { return string(o.Victim) + ", " + string(o.Action) })
		b.WriteString("## Checkpoints, by instant (256 MiB guest, harm to agent or helpers)\n\n")
		table(&b, "instant", filter(list, func(o Outcome) bool { return o.Victim != QEMU }), instant)
	}
	if list := filter(append(slices.Clone(harmed), unharmed...), func(o Outcome) bool {
		return !isRestore(o) && !isStore(o) && o.Victim != QEMU
	}); len(list) > 0 {
		b.WriteString("## By size of the guest (all of its RAM populated from 1 GiB on)\n\n")
		for _, size := range []string{"256 MiB", "1 GiB", "4 GiB", "8 GiB"} {
			sized := filter(list, func(o Outcome) bool { return o.Size == size })
			if len(sized) == 0 {
				continue
			}
			fmt.Fprintf(&b, "%s, bound %v:\n\n", size, Bound(Sizes[size].MemoryMiB))
			table(&b, "victim, action", sized, func(o Outcome) string { return string(o.Victim) + ", " + string(o.Action) })
		}
	}
	if list := filter(harmed, isRestore); len(list) > 0 {
		b.WriteString("## Lazy restores\n\nThe guest's memory is paged in slowly on purpose, so that the harm finds work under way. Afterwards the guest has verified all its memory, and nothing of ours is attached; or, where the harm came before the guest ran, nothing is left and the restore succeeds when repeated.\n\n")
		table(&b, "victim, action", list, func(o Outcome) string { return string(o.Victim) + ", " + string(o.Action) })
		table(&b, "instant", list, func(o Outcome) string { return o.Step })
	}
	if list := filter(append(slices.Clone(harmed), unharmed...), isStore); len(list) > 0 {
		b.WriteString("## Stores that hang, are full or slow\n\n")
		table(&b, "store", list, func(o Outcome) string { return o.Step })
	}
	if len(tests) > 0 {
		b.WriteString("## Counted elsewhere\n\n| what | result |\n|---|---|\n")
		for _, o := range tests {
			result := o.Log
			if len(o.Exceptions) > 0 {
				result = "**failed**"
			}
			fmt.Fprintf(&b, "| %s | %s |\n", o.Step, result)
		}
		b.WriteString("\n")
	}
	if exceptions > 0 {
		b.WriteString("## Exceptions\n\n")
		for _, o := range all {
			if len(o.Exceptions) > 0 {
				fmt.Fprintf(&b, "- %s, %s: %s\n", o.Size, o.Round, strings.Join(o.Exceptions, "; "))
			}
		}
		b.WriteString("\n")
	}
	return b.String(), nil
}

// instant groups rounds by when the harm came.
func instant(o Outcome) string {
	switch {
	case o.Kind == "random":
		return "random, anywhere"
	case o.Kind == "pause":
		return "random, in the pause"
	case strings.Contains(o.Step, "human-monitor-command"), strings.Contains(o.Step, "qom-"), strings.Contains(o.Step, "query-"):
		return "looking at the machine"
	}
	return o.Step
}

func filter(all []Outcome, keep func(Outcome) bool) (out []Outcome) {
	for _, o := range all {
		if keep(o) {
			out = append(out, o)
		}
	}
	return out
}
