// Package cgroup keeps processes apart: what must outlive the agent, or put things
// right when the agent is frozen or starved, does not share its control groups.
//
// A service manager ends what is left in a unit's group, an administrator freezes
// groups, a limit starves them. So guardian, fault server, pager and restored VMs
// each get a group of their own below "ckagent" in every hierarchy by which that
// happens: the unified one; of the old ones the freezer's and the service
// manager's. Of the old cpu controller they join the root group.
//
// All of it is best effort: without the right to make groups the processes work as
// well, only less apart; their sessions and pidfds do not depend on it. The package
// has no state; its functions may be called from any goroutine.
package cgroup
