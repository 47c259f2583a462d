package shipped

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// params reads an operator's parameters and describes them. The first mistake is
// kept; done reports it, and names that nobody asked for.
type params struct {
	given map[string]string
	known []*policy.Param
	err   error
}

func read(given map[string]string) *params { return &params{given: given} }

func (p *params) take(name, fallback, help string) string {
	value, ok := p.given[name]
	if !ok {
		value = fallback
	}
	p.known = append(p.known, &policy.Param{Name: name, Value: value, Help: help})
	return value
}

func (p *params) fail(name, value, want string) {
	if p.err == nil {
		p.err = fmt.Errorf("parameter %s=%q: want %s", name, value, want)
	}
}

// duration is a positive length of time.
func (p *params) duration(name string, fallback time.Duration, help string) float64 {
	v := p.take(name, fallback.String(), help)
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		p.fail(name, v, "a duration such as 15m")
		return fallback.Seconds()
	}
	return d.Seconds()
}

// share is a number between 0 and 1, without 0.
func (p *params) share(name string, fallback float64, help string) float64 {
	v := p.take(name, strconv.FormatFloat(fallback, 'g', -1, 64), help)
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || !(f > 0 && f <= 1) {
		p.fail(name, v, "a share between 0 and 1")
		return fallback
	}
	return f
}

// number is a positive number.
func (p *params) number(name string, fallback float64, help string) float64 {
	v := p.take(name, strconv.FormatFloat(fallback, 'g', -1, 64), help)
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || !(f > 0 && f < 1e15) {
		p.fail(name, v, "a positive number")
		return fallback
	}
	return f
}

func (p *params) done() error {
	if p.err != nil {
		return p.err
	}
	for _, name := range slices.Sorted(maps.Keys(p.given)) {
		if !slices.ContainsFunc(p.known, func(k *policy.Param) bool { return k.GetName() == name }) {
			var have []string
			for _, k := range p.known {
				have = append(have, k.GetName())
			}
			return fmt.Errorf("no parameter %q; there are: %s", name, strings.Join(have, ", "))
		}
	}
	return nil
}
