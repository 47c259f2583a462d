// Command nightly is a template for policies: a checkpoint at the same hour of each day.
package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

type nightly struct{ hour int }

func newNightly(params map[string]string) (policy.Policy, error) {
	n := nightly{hour: 3}
	for name, value := range params {
		hour, err := strconv.Atoi(value)
		if name != "hour" || err != nil || hour < 0 || hour > 23 {
			return nil, fmt.Errorf("parameter %s=%s: want hour=0 to 23", name, value)
		}
		n.hour = hour
	}
	return n, nil
}

func (n nightly) Describe() *policy.Description {
	return &policy.Description{Name: "nightly", Version: "1", Formula: "the next time it is hour o'clock (UTC)",
		Params: []*policy.Param{{Name: "hour", Value: strconv.Itoa(n.hour), Help: "of the day, in UTC"}}}
}

func (n nightly) Decide(s *policy.Signals) (*policy.Decision, error) {
	const day = int64(24 * time.Hour)
	switch retry := policy.Retry(s, day); { // never at once after a failure
	case retry > s.GetNowNs():
		return policy.At(retry, day, "the last one failed"), nil
	case retry != 0 || s.GetLastSuccessNs() == 0:
		return policy.Now("the first checkpoint, or the one that failed"), nil
	}
	t := time.Unix(0, s.GetNowNs()).UTC()
	at := time.Date(t.Year(), t.Month(), t.Day(), n.hour, 0, 0, 0, time.UTC)
	if !at.After(t) {
		at = at.AddDate(0, 0, 1)
	}
	return policy.At(at.UnixNano(), day, fmt.Sprintf("every day at %02d:00 UTC", n.hour)), nil
}

func main() { policy.Serve(newNightly) }
