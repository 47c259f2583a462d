// Command ckagent-policy-young-daly is the policy `young-daly` as a plugin; ckagent starts it.
package main

import (
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

func main() { policy.Serve(shipped.NewYoungDaly) }
