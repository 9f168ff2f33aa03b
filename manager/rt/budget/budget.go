package budget

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

const (
	runtimeFile = "cpu.rt_runtime_us"
	periodFile  = "cpu.rt_period_us"
	// mark holds what was lent to a cgroup: the runtime that it has by that, and
	// the one that it had before, in case the daemon ended in between.
	mark = "realtime"
)

// Budgets knows what was lent. Its methods may be called from several goroutines.
type Budgets struct {
	h *cgfs.Hierarchy // nil where the kernel does not budget

	mu   sync.Mutex
	lent map[uint64]*cgroup // by inode number; guarded by mu, as are the cgroups
	// owed: something could not be given back when it was due, and is tried again
	// after again; guarded by mu.
	owed  bool
	again time.Time
}

// Loan is runtime lent to a cgroup for a thread in it.
type Loan struct {
	b     *Budgets
	at    *cgroup // nil where nothing had to be lent
	share int
}

// cgroup is one that all its runtime is lent to.
type cgroup struct {
	dir *cgfs.Dir
	ino uint64
	// up is the cgroup above it, nil where that has runtime of its own.
	up    *cgroup
	loans map[*Loan]bool
	// kept is the share that an earlier daemon has lent to threads in it, until
	// Settle.
	kept int
}

// New makes Budgets for the hierarchies and finds what an earlier daemon lent. The
// caller takes the loans that are still needed again, and then calls Settle.
func New(set *cgfs.Set) (*Budgets, error) {
	b := &Budgets{lent: make(map[uint64]*cgroup)}
	h, ok := set.ByController("cpu")
	if !ok || h.Version() != cgfs.V1 {
		return b, nil
	}
	root, err := h.Open("/")
	if err != nil {
		return nil, fmt.Errorf("realtime budgets: %w", err)
	}
	defer root.Close()
	if _, err := root.FileAttr(runtimeFile); errors.Is(err, fs.ErrNotExist) {
		return b, nil
	} else if err != nil {
		return nil, fmt.Errorf("realtime budgets: %w", err)
	}
	b.h = h
	if err := b.find(root); err != nil {
		b.Close()
		return nil, fmt.Errorf("realtime budgets: %w", err)
	}
	return b, nil
}

// find finds the marks below root.
func (b *Budgets) find(root *cgfs.Dir) error {
	byPath := map[string]*cgroup{}
	err := root.Survey(func(d *cgfs.Dir) error {
		ours, err := lentTo(d)
		if err != nil || d.IsRoot() {
			return passOver(err)
		}
		if !ours {
			return passOver(d.ClearMark(mark))
		}
		c, err := newCgroup(d)
		if err != nil {
			return passOver(err)
		}
		b.lent[c.ino], byPath[d.Path()] = c, c
		has, err := ratio(d)
		if err != nil {
			return passOver(err)
		}
		below, err := children(d)
		c.kept = int((has-below)*100 + 0.5)
		return passOver(err)
	})
	for at, c := range byPath {
		c.up = byPath[path.Dir(at)]
	}
	return err
}

// passOver returns err, but nil for what says that the cgroup is gone: ENOENT of
// its files, ENODEV of those that are open.
func passOver(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// Close lets go of all handles. What is lent stays so, for the next daemon.
func (b *Budgets) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.lent {
		b.forgetLocked(c)
	}
}

// Needed reports whether the kernel budgets realtime on this host.
func (b *Budgets) Needed() bool { return b.h != nil }

// Take makes sure that threads in the cgroup target have runtime. Where there is
// none but what was lent, it lends share percent of the period out of what is left in the
// nearest cgroup above that has runtime of its own, up to and not beyond top; both are
// paths from the hierarchy's root. d is the decision that allows the grant. The
// *api.Error says what is missing in words for the requestor, to whom top is "": Denied
// where there is no runtime, Limit where too little is left, NotFound where the cgroup
// is gone.
func (b *Budgets) Take(d privcheck.Decision, target, top string, share int) (*Loan, error) {
	if b.h == nil {
		return &Loan{}, nil
	}
	if !d.Allowed() {
		return nil, api.Errorf(api.Denied, "lend realtime runtime: not decided")
	}
	if share < 1 || share > 100 {
		return nil, api.Errorf(api.Invalid, "lend realtime runtime: %d percent of a CPU: must be 1 to 100", share)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if start := time.Now(); b.owed && start.After(b.again) {
		_ = b.settleLocked() // nothing to do with this request
		// Who owes it may have made any number of cgroups below meanwhile.
		if took := time.Since(start); took > 10*time.Millisecond {
			b.again = start.Add(20 * took)
		}
	}
	if !privcheck.Below(top, target) {
		return b.outsideLocked(target)
	}
	levels, err := b.open(target, top)
	if err != nil {
		return nil, unreadable(err)
	}
	defer closeAll(levels)
	l, err := b.takeLocked(levels, share)
	if err != nil {
		return nil, unreadable(err)
	}
	return l, nil
}

// outsideLocked is Take for a cgroup that the requestor has no say over.
func (b *Budgets) outsideLocked(target string) (*Loan, error) {
	d, err := b.h.Open(target)
	if err != nil {
		return nil, unreadable(err)
	}
	defer d.Close()
	has, err := number(d, runtimeFile)
	if err != nil {
		return nil, unreadable(err)
	}
	if has == 0 {
		return nil, api.Errorf(api.Denied, "the thread's cgroup has no realtime runtime, and it lies outside your own, so that none can be lent to it").
			WithHint("ask from a cgroup that the thread's is in, or have its rt.runtime set")
	}
	return &Loan{}, nil
}

// unreadable makes an error for the requestor of one of the kernel's.
func unreadable(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	if passOver(err) == nil {
		return api.Errorf(api.NotFound, "the thread's cgroup is gone").WithCause(err)
	}
	return &api.Error{Kind: api.Internal, Text: "the thread's realtime runtime cannot be told; the daemon's log says more", Cause: err}
}

// open opens the cgroups from top down to target.
func (b *Budgets) open(target, top string) ([]*cgfs.Dir, error) {
	d, err := b.h.Open(top)
	if err != nil {
		return nil, err
	}
	levels := []*cgfs.Dir{d}
	rest := strings.Trim(strings.TrimPrefix(target, top), "/")
	for name := range strings.SplitSeq(rest, "/") {
		if name == "" {
			break // target is top
		}
		if d, err = d.Open(name); err != nil {
			closeAll(levels)
			return nil, err
		}
		levels = append(levels, d)
	}
	return levels, nil
}

func closeAll(dirs []*cgfs.Dir) {
	for _, d := range dirs {
		_ = d.Close()
	}
}

func (b *Budgets) takeLocked(levels []*cgfs.Dir, share int) (*Loan, error) {
	source, err := b.sourceLocked(levels)
	if err != nil {
		return nil, err
	}
	last := len(levels) - 1
	if source < last {
		if err := crowded(levels[source:]); err != nil {
			return nil, err
		}
	}
	at, err := b.knownLocked(levels[last])
	if err != nil {
		return nil, err
	}
	if at != nil {
		if at.share() < share && source < last {
			if err := b.raiseLocked(levels, source, share-at.share()); err != nil {
				return nil, err
			}
		}
	} else if source < last {
		if err := b.raiseLocked(levels, source, share); err != nil {
			return nil, err
		}
		if at, err = b.knownLocked(levels[last]); err != nil {
			return nil, err
		}
	}
	if at == nil {
		return &Loan{}, nil // it has runtime of its own
	}
	l := &Loan{b: b, at: at, share: share}
	at.loans[l] = true
	return l, nil
}

// maxChildren is how many cgroups may be right below one that lends, or that is lent to.
// All of them are looked at, and nobody on the host is granted anything meanwhile.
const maxChildren = 4096

// crowded returns an error if one of the levels has more.
func crowded(levels []*cgfs.Dir) error {
	for _, d := range levels {
		n, err := d.NumChildren()
		if err != nil {
			return err
		}
		if n > maxChildren {
			return api.Errorf(api.Limit, "more than %d cgroups lie right below the thread's cgroup, or one above that, which has the realtime runtime", maxChildren).
				WithHint("remove some, or have them grouped below others")
		}
	}
	return nil
}

// sourceLocked returns which of the levels, from top down, the last one gets its
// runtime from: the nearest to it that has runtime which was not lent to it. The
// first may have it from further out: what it has is what there is.
func (b *Budgets) sourceLocked(levels []*cgfs.Dir) (int, error) {
	for i, d := range slices.Backward(levels) {
		has, err := number(d, runtimeFile)
		if err != nil {
			return 0, err
		}
		if has == 0 {
			continue
		}
		ours, err := lentTo(d)
		if err != nil {
			return 0, err
		}
		if i == 0 || !ours {
			return i, nil
		}
	}
	return 0, api.Errorf(api.Denied, "the thread's cgroup%s has no realtime runtime, and none of those above it has any to lend, up to and with your own", called(levels)).
		WithHint("have rt.runtime of your own cgroup set by whoever runs the host")
}

// called is the name of the last of the levels as the requestor knows it, or "" if
// it is the requestor's own cgroup.
func called(levels []*cgfs.Dir) string {
	top, path := levels[0].Path(), levels[len(levels)-1].Path()
	name := strings.Trim(strings.TrimPrefix(path, top), "/")
	if name == "" {
		return ""
	}
	return " " + strconv.Quote(name)
}

// knownLocked returns the cgroup behind d, or nil if nothing is lent to it.
func (b *Budgets) knownLocked(d *cgfs.Dir) (*cgroup, error) {
	a, err := d.Attr()
	if err != nil {
		return nil, err
	}
	c := b.lent[a.Ino]
	if c == nil {
		return nil, nil
	}
	ours, err := lentTo(d)
	if err != nil || ours {
		return c, err
	}
	// Somebody has set another value: it is theirs.
	b.forgetLocked(c)
	return nil, d.ClearMark(mark)
}

// raiseLocked gives every level below the one called source growth percent more of
// its period, or none of them.
func (b *Budgets) raiseLocked(levels []*cgfs.Dir, source, growth int) (err error) {
	var undo []func()
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
	}()
	up, err := b.knownLocked(levels[source])
	if err != nil {
		return err
	}
	// The kernel lets no cgroup have more than the one above it.
	for _, d := range levels[source+1:] {
		c, err := b.knownLocked(d)
		if err != nil {
			return err
		}
		known := c != nil
		if !known {
			if c, err = newCgroup(d); err != nil {
				return err
			}
			c.up = up
		}
		var had int64
		err = patiently(func() bool { return enough(levels[source], growth) }, func() (err error) {
			had, err = c.raise(growth)
			return err
		})
		if err != nil {
			if !known {
				_ = c.dir.Close()
			}
			return b.explain(levels, source, growth, err)
		}
		b.lent[c.ino] = c
		undo = append(undo, func() {
			_ = c.set(had)
			if !known {
				b.forgetLocked(c)
			}
		})
		up = c
	}
	return nil
}

// explain says why the levels below source get no more.
func (b *Budgets) explain(levels []*cgfs.Dir, source, growth int, err error) error {
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	left, lerr := left(levels[source])
	if lerr != nil {
		return lerr
	}
	where := "the cgroup above"
	if source == 0 && levels[0].Path() != "/" {
		where = "your own cgroup"
	}
	return api.Errorf(api.Limit, "the thread's cgroup%s needs %d %% of each CPU for realtime, and %s has %.3g %% left", called(levels), growth, where, left*100).
		WithHint("give back other grants, or lower rt.runtime of other cgroups").WithCause(err)
}

// patiently does f, and again for a moment while the kernel refuses what can be done
// as far as is seen: it counts a cgroup that was removed for some milliseconds more.
func patiently(can func() bool, f func() error) error {
	for end := time.Now().Add(patience); ; {
		err := f()
		if !errors.Is(err, unix.EINVAL) || time.Now().After(end) || !can() {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// patience is how long that may last on a busy machine.
const patience = 200 * time.Millisecond

// enough reports whether d has percent left.
func enough(d *cgfs.Dir, percent int) bool {
	l, err := left(d)
	return err == nil && l*100 >= float64(percent)
}

// left is the share of its period that d does not give to those below it.
func left(d *cgfs.Dir) (float64, error) {
	has, err := ratio(d)
	if err != nil {
		return 0, err
	}
	given, err := children(d)
	return max(has-given, 0), err
}

func ratio(d *cgfs.Dir) (float64, error) {
	runtime, err := number(d, runtimeFile)
	if err != nil {
		return 0, err
	}
	period, err := number(d, periodFile)
	if err != nil || period <= 0 {
		return 0, err
	}
	if runtime < 0 {
		return 1, nil // no limit
	}
	return float64(runtime) / float64(period), nil
}

// children is what the cgroups right below d have together, as a share of their
// periods.
func children(d *cgfs.Dir) (sum float64, err error) {
	err = d.EachChild(func(c *cgfs.Dir, _ string) error {
		r, err := ratio(c)
		sum += r
		return passOver(err)
	})
	return sum, err
}

// childrenLocked is children, of those that runtime is lent to. It calls f, which may
// be nil, for the others.
func (b *Budgets) childrenLocked(d *cgfs.Dir, f func(*cgfs.Dir) error) (sum float64, err error) {
	err = d.EachChild(func(c *cgfs.Dir, _ string) error {
		known, err := b.knownLocked(c)
		if err == nil && known != nil {
			var r float64
			r, err = ratio(c)
			sum += r
		} else if err == nil && f != nil {
			err = f(c)
		}
		return passOver(err)
	})
	return sum, err
}

// empty takes all its runtime from a cgroup, and from those below it.
func empty(d *cgfs.Dir) error {
	has, err := number(d, runtimeFile)
	if err != nil || has == 0 {
		return err
	}
	if err := d.EachChild(func(c *cgfs.Dir, _ string) error { return passOver(empty(c)) }); err != nil {
		return err
	}
	f, err := d.File(runtimeFile, cgfs.ForWrite)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Write("0")
}

// Give gives it back, once no other thread needs it. It returns an *api.Error of
// kind Busy while there is a realtime thread in the cgroup; it is tried again with
// the next loan.
func (l *Loan) Give() error {
	if l == nil || l.at == nil {
		return nil
	}
	l.b.mu.Lock()
	defer l.b.mu.Unlock()
	at := l.at
	l.at = nil
	delete(at.loans, l)
	return l.b.giveLocked(at)
}

// Settle gives back what was lent and is needed no more: by an earlier daemon, or
// because it could not be given back when it was due.
func (b *Budgets) Settle() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.lent {
		c.kept = 0
	}
	return b.settleLocked()
}

func (b *Budgets) settleLocked() error {
	b.owed = false
	// Children before their parents.
	all := slices.SortedFunc(maps.Values(b.lent), func(x, y *cgroup) int {
		return strings.Count(y.dir.Path(), "/") - strings.Count(x.dir.Path(), "/")
	})
	var errs []error
	for _, c := range all {
		errs = append(errs, b.giveLocked(c))
	}
	return errors.Join(errs...)
}

// giveLocked takes back from c, and from those above it, what they do not need.
func (b *Budgets) giveLocked(c *cgroup) error {
	for ; c != nil; c = c.up {
		if b.lent[c.ino] != c {
			continue // given back, or somebody's own by now
		}
		keep, err := b.lowerLocked(c)
		switch {
		case passOver(err) == nil && err != nil:
			keep = false
		case err != nil:
			b.owed = true
			if errors.Is(err, unix.EBUSY) {
				return api.Errorf(api.Busy, "a realtime thread is still in a cgroup that runtime was lent to").WithCause(err)
			}
			return err
		}
		if !keep {
			b.forgetLocked(c)
		}
	}
	return nil
}

func (b *Budgets) forgetLocked(c *cgroup) {
	delete(b.lent, c.ino)
	_ = c.dir.Close()
}

// newCgroup makes a cgroup with a handle of its own.
func newCgroup(d *cgfs.Dir) (*cgroup, error) {
	own, err := d.Open("")
	if err != nil {
		return nil, err
	}
	a, err := own.Attr()
	if err != nil {
		_ = own.Close()
		return nil, err
	}
	return &cgroup{dir: own, ino: a.Ino, loans: make(map[*Loan]bool)}, nil
}

// share is the largest share that a loan of c's is for.
func (c *cgroup) share() int {
	most := c.kept
	for l := range c.loans {
		most = max(most, l.share)
	}
	return most
}

// raise gives c percent more of its period. It returns what it had.
func (c *cgroup) raise(percent int) (had int64, err error) {
	if had, err = number(c.dir, runtimeFile); err != nil {
		return 0, err
	}
	period, err := number(c.dir, periodFile)
	if err != nil {
		return 0, err
	}
	return had, c.set(had + (period*int64(percent)+99)/100)
}

// lowerLocked takes from c what neither its own threads nor loans below it need. What
// others have set below it they have set out of the loan, and it ends with that: else
// whoever may set a runtime could keep one loan after the other. keep is false if it has
// nothing any more that was lent to it.
func (b *Budgets) lowerLocked(c *cgroup) (keep bool, err error) {
	ours, err := lentTo(c.dir)
	if err != nil {
		return false, err
	}
	if !ours {
		return false, c.dir.ClearMark(mark)
	}
	has, err := number(c.dir, runtimeFile)
	if err != nil {
		return false, err
	}
	period, err := number(c.dir, periodFile)
	if err != nil {
		return false, err
	}
	need := (period*int64(c.share()) + 99) / 100
	if need >= has {
		return true, nil
	}
	below, err := b.childrenLocked(c.dir, nil)
	if err != nil {
		return false, err
	}
	need += int64(below*float64(period) + 0.999)
	if need < has {
		if _, err := b.childrenLocked(c.dir, empty); err != nil {
			return true, err
		}
		// It can: need is what those below have.
		err := patiently(func() bool { return true }, func() error { return c.set(need) })
		if err != nil {
			return true, err
		}
	}
	return need > 0, nil
}

// set writes c's runtime, and the mark before it.
func (c *cgroup) set(runtime int64) error {
	had, err := number(c.dir, runtimeFile)
	if err != nil {
		return err
	}
	if err := c.dir.SetMark(mark, fmt.Sprintf("%d %d", runtime, had)); err != nil {
		return err
	}
	f, err := c.dir.File(runtimeFile, cgfs.ForWrite)
	if err == nil {
		err = f.Write(strconv.FormatInt(runtime, 10))
		_ = f.Close()
	}
	if err == nil && runtime > 0 {
		return nil
	}
	if err != nil && had > 0 {
		return errors.Join(err, c.dir.SetMark(mark, fmt.Sprintf("%d %d", had, had)))
	}
	return errors.Join(err, c.dir.ClearMark(mark))
}

// lentTo reports whether the runtime that d has was lent to it: the mark says so,
// and nobody has set another since.
func lentTo(d *cgfs.Dir) (bool, error) {
	v, ok, err := d.Mark(mark)
	if err != nil || !ok {
		return false, err
	}
	has, err := number(d, runtimeFile)
	return err == nil && has > 0 && slices.Contains(strings.Fields(v), strconv.FormatInt(has, 10)), err
}

func number(d *cgfs.Dir, file string) (int64, error) {
	f, err := d.File(file, cgfs.ForRead)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b, err := f.Read(64)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", file, err)
	}
	return n, nil
}
