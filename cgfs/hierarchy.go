package cgfs

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Version is a version of the cgroup interface.
type Version int

// The versions.
const (
	V1 Version = 1
	V2 Version = 2
)

// Options says which hierarchies to open.
type Options struct {
	// Skip names controllers (or name=X) whose v1 hierarchies are left alone.
	// On v2, which all its controllers share, a skipped one is not listed and
	// never enabled; "unified" leaves out the v2 hierarchy itself.
	Skip []string
	// Mount names controllers (or name=X), each to be bound to a v1 hierarchy
	// of its own if it is in none. One that cgroup v2 has is never taken away
	// from it: that is an error.
	Mount []string
}

// Set is the hierarchies of this host. Its methods may be called from several
// goroutines, except for Close.
type Set struct {
	hierarchies []*Hierarchy
	controllers []string
	skip        []string
	hugeSizes   []string // "2MB", "1GB"
}

// Hierarchy is one hierarchy, held by a detached mount of this process's own:
// nobody can cover or unmount it, and nothing is ever mounted inside.
type Hierarchy struct {
	version     Version
	name        string
	controllers []string
	named       bool
	id          string // the first field of /proc/PID/cgroup
	delegation  []string
	fd          int // the mount, from fsmount(2)

	devices sync.Mutex // held while device rules of v2 are looked at and changed
}

// Open finds the hierarchies that are mounted in this process's mount
// namespace and opens them. It needs CAP_SYS_ADMIN.
func Open(o Options) (_ *Set, err error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	mounts, err := parseMountinfo(string(info))
	if err != nil {
		return nil, err
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	all, err := parseAttached(string(self))
	if err != nil {
		return nil, err
	}

	s := &Set{hugeSizes: hugePageSizes(), skip: o.Skip}
	defer func() {
		if err != nil {
			_ = s.Close()
		}
	}()
	for _, a := range all {
		if !mounted(a, mounts) {
			continue
		}
		if err := s.add(a, o.Skip); err != nil {
			return nil, err
		}
	}
	for _, token := range o.Mount {
		if err := s.bind(token, all); err != nil {
			return nil, err
		}
	}
	s.sort()
	return s, nil
}

// mounted reports whether the hierarchy a is mounted somewhere. A v1
// hierarchy's options name each of its controllers, and no other one.
func mounted(a attached, mounts []mount) bool {
	return slices.ContainsFunc(mounts, func(m mount) bool {
		if len(a.tokens) == 0 {
			return m.fstype == "cgroup2"
		}
		return m.fstype == "cgroup" && !slices.ContainsFunc(a.tokens, func(t string) bool {
			return !slices.Contains(m.options, t)
		})
	})
}

func (s *Set) add(a attached, skip []string) error {
	skipped := func(token string) bool {
		return slices.Contains(skip, token) || token == "name=systemd" && slices.Contains(skip, "systemd")
	}
	if slices.ContainsFunc(a.tokens, skipped) || len(a.tokens) == 0 && skipped("unified") {
		return nil
	}
	fd, err := mountDetached(a.tokens)
	if err != nil {
		return err
	}
	h := &Hierarchy{version: V1, fd: fd, id: a.id, controllers: a.tokens}
	s.hierarchies = append(s.hierarchies, h) // from here on closed with s
	if len(a.tokens) > 0 {
		h.name = strings.Join(a.tokens, ",")
		h.named = len(a.tokens) == 1 && strings.HasPrefix(a.tokens[0], "name=")
		h.delegation = []string{"tasks", "cgroup.procs"}
		return nil
	}
	h.version, h.name, h.delegation = V2, "unified", delegationFiles()
	root, err := h.Open("/")
	if err != nil {
		return err
	}
	defer root.Close()
	h.controllers, err = root.words("cgroup.controllers")
	h.controllers = slices.DeleteFunc(h.controllers, skipped)
	return err
}

// bind opens a v1 hierarchy for a controller or name=X that no mounted
// hierarchy has. One that exists in the kernel all the same (children outlive
// the last mount) is used as it is.
func (s *Set) bind(token string, all []attached) error {
	if token == "systemd" {
		token = "name=systemd"
	}
	if h, ok := s.ByController(token); ok {
		if h.version == V2 {
			return fmt.Errorf("mount %s: cgroup v2 has this controller and keeps it", token)
		}
		return nil
	}
	if !validToken(token) {
		return fmt.Errorf("mount %q: %w: neither a controller in /proc/cgroups nor name=NAME", token, ErrName)
	}
	for _, a := range all {
		if slices.Contains(a.tokens, token) {
			return s.addUnmounted(a)
		}
	}
	if !strings.HasPrefix(token, "name=") {
		// It may be v2's without a mount of v2 in sight, or skipped above.
		if v2, err := v2Controllers(all); err != nil {
			return err
		} else if slices.Contains(v2, token) {
			return fmt.Errorf("mount %s: cgroup v2 has this controller and keeps it", token)
		}
	}
	return s.addUnmounted(attached{tokens: []string{token}})
}

// addUnmounted is add for a hierarchy that nobody has mounted. The kernel numbers
// it anew: one that was listed may have been about to go with its last mount, in
// another daemon that has just ended.
func (s *Set) addUnmounted(a attached) error {
	if err := s.add(a, nil); err != nil {
		return err
	}
	h := s.hierarchies[len(s.hierarchies)-1]
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	now, err := parseAttached(string(self))
	if err != nil {
		return err
	}
	for _, a := range now { // the newest comes first
		if slices.Equal(a.tokens, h.controllers) {
			h.id = a.id
			return nil
		}
	}
	return fmt.Errorf("mount %s: %w", h.name, ErrNoController)
}

// validToken keeps options of the mount ("none", "noprefix", "release_agent=")
// from being taken for controllers.
func validToken(token string) bool {
	name, named := strings.CutPrefix(token, "name=")
	if name == "" || len(name) > 63 { // MAX_CGROUP_ROOT_NAMELEN
		return false
	}
	if !named {
		enabled, err := os.ReadFile("/proc/cgroups")
		return err == nil && strings.Contains(string(enabled), "\n"+token+"\t")
	}
	return strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == ""
}

// v2Controllers returns the controllers that cgroup v2 has, if it was ever
// mounted on this host: before that nobody can use them there.
func v2Controllers(all []attached) ([]string, error) {
	i := slices.IndexFunc(all, func(a attached) bool { return a.id == "0" })
	if i < 0 {
		return nil, nil
	}
	var s Set
	defer s.Close()
	if err := s.add(all[i], nil); err != nil {
		return nil, err
	}
	return s.hierarchies[0].controllers, nil
}

func (s *Set) sort() {
	first := func(h *Hierarchy) string {
		if h.version == V2 || len(h.controllers) == 0 {
			return "\xff" // behind every other one
		}
		return bare(h.controllers[0])
	}
	slices.SortStableFunc(s.hierarchies, func(a, b *Hierarchy) int { return cmp.Compare(first(a), first(b)) })
	for _, h := range s.hierarchies {
		s.controllers = append(s.controllers, h.controllers...)
	}
	for _, o := range otherNames {
		if _, ok := s.ByController(o.name); ok && !slices.Contains(s.controllers, o.name) {
			s.controllers = append(s.controllers, o.name)
		}
	}
	slices.SortFunc(s.controllers, func(a, b string) int { return cmp.Compare(bare(a), bare(b)) })
}

func bare(token string) string { return strings.TrimPrefix(token, "name=") }

// mountDetached mounts the v1 hierarchy with exactly these controllers and
// name, or with no tokens that of v2, without attaching it anywhere.
func mountDetached(tokens []string) (fd int, err error) {
	// One whose last mount went away a moment ago is waited for by the kernel, which
	// then starts the call again (EINTR), and refuses it: the context is in use.
	for end := time.Now().Add(dyingWait); ; time.Sleep(10 * time.Millisecond) {
		fd, err = tryMount(tokens)
		again := errors.Is(err, unix.EINTR) || errors.Is(err, unix.EBUSY)
		if !again || time.Now().After(end) {
			return fd, err
		}
	}
}

// dyingWait is how long a hierarchy that is going is waited for.
const dyingWait = time.Second

func tryMount(tokens []string) (_ int, err error) {
	fstype, magic := "cgroup", int64(unix.CGROUP_SUPER_MAGIC)
	if len(tokens) == 0 {
		fstype, magic = "cgroup2", unix.CGROUP2_SUPER_MAGIC
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open hierarchy %q: %w", cmp.Or(strings.Join(tokens, ","), "unified"), err)
		}
	}()
	ctx, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(ctx)
	bound := false
	for _, t := range tokens {
		if name, ok := strings.CutPrefix(t, "name="); ok {
			err = unix.FsconfigSetString(ctx, "name", name)
		} else {
			err = unix.FsconfigSetFlag(ctx, t)
			bound = true
		}
		if err != nil {
			return -1, os.NewSyscallError("fsconfig", err)
		}
	}
	if len(tokens) > 0 && !bound {
		if err := unix.FsconfigSetFlag(ctx, "none"); err != nil {
			return -1, os.NewSyscallError("fsconfig", err)
		}
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, os.NewSyscallError("fsconfig", err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsmount", err)
	}
	var st unix.Statfs_t
	if err = unix.Fstatfs(fd, &st); err == nil && st.Type != magic {
		err = errors.New("not a cgroup file system")
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// delegationFiles are the files that give a v2 subtree to somebody: those that
// the kernel lists (Documentation/admin-guide/cgroup-v2.rst, "Model of
// Delegation") as far as they are known to be harmless, and at least the three
// without which nothing works.
func delegationFiles() []string {
	files := []string{"cgroup.procs", "cgroup.threads", "cgroup.subtree_control"}
	known := []string{
		"memory.oom.group", "memory.reclaim",
		"cpu.pressure", "io.pressure", "irq.pressure", "memory.pressure",
	}
	list, err := os.ReadFile("/sys/kernel/cgroup/delegate")
	if err != nil {
		return files
	}
	for f := range strings.FieldsSeq(string(list)) {
		if slices.Contains(known, f) {
			files = append(files, f)
		}
	}
	return files
}

// Hierarchies returns all of them, v1 in the order of their first controller,
// v2 last. The slice is not to be changed.
func (s *Set) Hierarchies() []*Hierarchy { return s.hierarchies }

// ByController finds the hierarchy of a controller, or of a name ("name=X").
// "systemd" means "name=systemd". A name that only the other version has means
// the hierarchy that does the same here (see otherNames).
func (s *Set) ByController(name string) (*Hierarchy, bool) {
	if name == "systemd" {
		name = "name=systemd"
	}
	for _, h := range s.hierarchies {
		if h.Has(name) {
			return h, true
		}
	}
	if slices.Contains(s.skip, name) {
		return nil, false
	}
	for _, h := range s.hierarchies {
		if _, ok := h.other(name); ok {
			return h, true
		}
	}
	return nil, false
}

// Controllers returns the names that ByController knows: of all controllers,
// under the other version's name too, and name=X, which is sorted as X. The
// slice is not to be changed.
func (s *Set) Controllers() []string { return s.controllers }

// Unified returns the v2 hierarchy if there is one.
func (s *Set) Unified() (*Hierarchy, bool) {
	for _, h := range s.hierarchies {
		if h.version == V2 {
			return h, true
		}
	}
	return nil, false
}

// Close lets go of all hierarchies. Every Dir of theirs must be closed before.
func (s *Set) Close() error {
	var err error
	for _, h := range s.hierarchies {
		err = errors.Join(err, unix.Close(h.fd))
	}
	s.hierarchies = nil
	return err
}

// Version returns the version of the interface.
func (h *Hierarchy) Version() Version { return h.version }

// Name is a name for messages: "memory", "cpu,cpuacct", "name=systemd",
// "unified".
func (h *Hierarchy) Name() string { return h.name }

// Controllers returns the controllers, and name=X if it has a name. The slice
// is not to be changed.
func (h *Hierarchy) Controllers() []string { return h.controllers }

// Has reports whether ctrl is among Controllers.
func (h *Hierarchy) Has(ctrl string) bool { return slices.Contains(h.controllers, ctrl) }

// Named reports whether this is a v1 hierarchy with a name and no controller.
func (h *Hierarchy) Named() bool { return h.named }

// TasksFile is the file into which a task's number is written to move it: a
// thread's on v1 ("tasks"), a process's on v2 ("cgroup.procs").
func (h *Hierarchy) TasksFile() string { return h.FileName("tasks") }

// FileName returns the name that a file has here: on v2 "tasks" is
// "cgroup.procs".
func (h *Hierarchy) FileName(name string) string {
	if h.version == V2 && name == "tasks" {
		return "cgroup.procs"
	}
	return name
}

// DelegationFiles are the files that are given away together with the
// directory (Chown). A cgroup may lack some of them. The slice is not to be
// changed.
func (h *Hierarchy) DelegationFiles() []string { return h.delegation }

// Open opens the directory at path, from the hierarchy's root: "/", "/a/b".
func (h *Hierarchy) Open(path string) (*Dir, error) {
	rel, ok := strings.CutPrefix(path, "/")
	if !ok {
		return nil, fmt.Errorf("%w: not from the root", ErrName)
	}
	if rel == "" {
		return h.openDir(h.fd, ".", path, path)
	}
	if err := checkRelative(rel); err != nil {
		return nil, err
	}
	return h.openDir(h.fd, rel, path, path)
}

// hugePageSizes returns the sizes of huge pages that this host knows, spelled
// as the hugetlb controller spells them in the names of its files (mem_fmt in
// the kernel's hugetlb_cgroup.c).
func hugePageSizes() []string {
	entries, err := os.ReadDir("/sys/kernel/mm/hugepages")
	if err != nil {
		return nil // a kernel without huge pages
	}
	var sizes []string
	for _, e := range entries {
		var kb uint64
		if n, err := fmt.Sscanf(e.Name(), "hugepages-%dkB", &kb); n != 1 || err != nil {
			continue
		}
		switch {
		case kb >= 1<<20:
			sizes = append(sizes, fmt.Sprintf("%dGB", kb>>20))
		case kb >= 1<<10:
			sizes = append(sizes, fmt.Sprintf("%dMB", kb>>10))
		default:
			sizes = append(sizes, fmt.Sprintf("%dKB", kb))
		}
	}
	slices.Sort(sizes)
	return sizes
}
