package budget

import (
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
)

// Refusal puts into words why the kernel refused, with err, to write value to a file
// of d: a cgroup's realtime runtime or period, or a realtime task that is to enter
// it. The Text of what it returns is the reason alone. It returns nil where it knows
// nothing about it.
func Refusal(d *cgfs.Dir, file, value string, err error) *api.Error {
	if d.Hierarchy().Version() != cgfs.V1 || !d.Hierarchy().Has("cpu") {
		return nil
	}
	switch {
	case file == runtimeFile || file == periodFile:
	case errors.Is(err, unix.EINVAL):
		// Of what a task can be refused for in this hierarchy, this is the one that
		// has a number.
		if has, rerr := number(d, runtimeFile); rerr == nil && has == 0 {
			return api.Errorf(api.Denied, "it is realtime, and the cgroup has no realtime runtime").
				WithHint("set rt.runtime of the cgroup first").WithCause(err)
		}
		return nil
	default:
		return nil
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return api.Errorf(api.Busy, "a realtime thread is in the cgroup, which needs its runtime").
			WithHint("make it an ordinary one first (cgm rt revoke, chrt --other)").WithCause(err)
	case errors.Is(err, unix.EINVAL):
		return excess(d, file, value).WithCause(err)
	}
	return nil
}

// excess says which of the kernel's bounds a value exceeds: for the period, for the
// cgroups below, or else for the one above.
func excess(d *cgfs.Dir, file, value string) *api.Error {
	runtime, rerr := number(d, runtimeFile)
	period, perr := number(d, periodFile)
	v, verr := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
	if err := errors.Join(rerr, perr, verr); err != nil {
		return api.Errorf(api.Invalid, "the kernel takes no such realtime runtime or period")
	}
	if file == runtimeFile {
		runtime = v
	} else {
		period = v
	}
	if runtime > period {
		return api.Errorf(api.Invalid, "a realtime runtime of %d us is more than the period of %d us", runtime, period)
	}
	if below, err := children(d); err == nil && period > 0 && float64(runtime)/float64(period) < below {
		return api.Errorf(api.Invalid, "the cgroups below it have more realtime runtime than that, %.3g %% of their periods together", below*100).
			WithHint("lower rt.runtime of those first")
	}
	return api.Errorf(api.Limit, "the cgroup above it does not have so much realtime runtime left").
		WithHint("raise rt.runtime of that one first, or lower that of the cgroups beside it")
}
