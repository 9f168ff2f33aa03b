package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
	"cgmanager/manager/systemd"
	"cgmanager/privcheck"
)

// startTimeout is how long systemd may take to start a scope.
const startTimeout = 20 * time.Second

// start has systemd make a scope, and gives it to p.
func (sc *scopes) start(d privcheck.Decision, p *party, own, path string) error {
	if !d.Allowed() {
		return errors.New("not decided")
	}
	holder, err := sc.hold()
	if err != nil {
		return fmt.Errorf("start the process that holds the scope: %w", err)
	}
	kept := false
	defer func() {
		if !kept {
			holder.Close()
		}
	}()
	slice := parent(path)
	unit, _, _ := strings.Cut(strings.TrimPrefix(own[len(slice):], "/"), "/")
	if slice == "/" {
		unit = base(own)
	}
	s := systemd.Scope{
		Name: base(path), Slice: base(slice), PID: holder.PID(),
		Description: fmt.Sprintf("Control groups of UID %d in %s", p.r.UID, unit),
	}
	if slice == "/" {
		s.Slice = "-.slice"
	}
	for _, h := range sc.set.Hierarchies() {
		if h.Version() == cgfs.V1 && sc.managed(h) && !h.Named() {
			s.Controllers = append(s.Controllers, slices.DeleteFunc(slices.Clone(h.Controllers()), func(ctrl string) bool {
				return !slices.Contains(itsControllers, ctrl)
			})...)
		}
	}
	if systemd.IsUnit(unit) {
		// It ends when systemd is told to stop the unit, as a session's
		// processes do or do not at its end (logind.conf(5), KillUserProcesses=).
		s.PartOf = unit
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := systemd.Start(ctx, s); err != nil {
		return err
	}
	if err := sc.furnish(holder.PID(), p, own, path); err != nil {
		sc.removeElsewhere(path)
		return err
	}
	if err := holder.Keep(p.r.UID, p.r.GID); err != nil {
		sc.removeElsewhere(path)
		return err
	}
	kept = true
	sc.tend1(path, holder)
	return nil
}

// furnish gives the new scope to p and makes its cgroups in the hierarchies that
// systemd leaves alone.
func (sc *scopes) furnish(holder int32, p *party, own, path string) error {
	process, start, at, err := sc.process(holder)
	if err != nil {
		return err
	}
	process.Close()
	if at != path {
		return fmt.Errorf("systemd did not put process %d into %s", holder, path)
	}
	for _, h := range sc.set.Hierarchies() {
		if !scoped(h) {
			continue
		}
		var d *cgfs.Dir
		if sc.managed(h) {
			d, err = h.Open(path)
		} else {
			d, err = makeAll(h, path)
		}
		if err != nil {
			return fmt.Errorf("in %s: %w", h.Name(), err)
		}
		err = give(d, p.r.UID, p.r.GID)
		if err == nil && h == sc.tree {
			err = errors.Join(
				d.SetMark(holderMark, fmt.Sprintf("%d %d", holder, start)),
				d.SetMark(scopeMark, scopeOf(p.r.UID, own)))
		}
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// makeAll makes what is missing on the way to path. All of it is root's.
func makeAll(h *cgfs.Hierarchy, path string) (*cgfs.Dir, error) {
	d, err := h.Open("/")
	if err != nil {
		return nil, err
	}
	for name := range strings.SplitSeq(path[1:], "/") {
		next, err := d.Open(name)
		if errors.Is(err, unix.ENOENT) {
			if next, err = d.Mkdir(name, 0, 0); err == nil {
				err = next.SetMark(madeMark, "1")
			}
		}
		_ = d.Close()
		if err != nil {
			return nil, err
		}
		d = next
	}
	return d, nil
}

// give gives a cgroup away, with its files of delegation and none of its limits.
func give(d *cgfs.Dir, uid, gid uint32) error {
	for _, name := range d.Hierarchy().DelegationFiles() {
		f, err := d.File(name, cgfs.ForFacts)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		err = f.SetOwner(uid, gid)
		_ = f.Close()
		if err != nil {
			return err
		}
	}
	return d.SetOwner(uid, gid)
}
