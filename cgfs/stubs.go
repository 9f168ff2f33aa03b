package cgfs

import "errors"

// Version is a version of the cgroup interface.
type Version int

// The versions.
const (
	V1 Version = 1
	V2 Version = 2
)

// Errors of this package, to be found with errors.Is. What the kernel refuses
// comes as *os.PathError with the name as the caller wrote it.
var (
	ErrNoController = errors.New("no such controller")
	ErrUnsupported  = errors.New("not supported on this hierarchy")
	ErrValue        = errors.New("invalid value")
	ErrName         = errors.New("invalid name")
	ErrTooBig       = errors.New("too big")
)

// Options says which hierarchies to open.
type Options struct {
	// Skip names controllers whose hierarchies are left alone.
	Skip []string
	// Mount names controllers (or name=X) to be bound to a new v1 hierarchy
	// if they are in none and not used by v2.
	Mount []string
}

// Set is the hierarchies of this host.
type Set struct{}

func Open(o Options) (*Set, error) { panic("todo") }

// Hierarchies returns all of them, v1 in the order of their first controller, v2 last.
func (s *Set) Hierarchies() []*Hierarchy { panic("todo") }

// ByController finds the hierarchy of a controller. "systemd" means "name=systemd".
func (s *Set) ByController(name string) (*Hierarchy, bool) { panic("todo") }

// Controllers returns the names of all controllers, sorted as the original's
// ListControllers does: name=X counts as X.
func (s *Set) Controllers() []string { panic("todo") }
func (s *Set) Close() error          { panic("todo") }

// Hierarchy is one.
type Hierarchy struct{}

func (h *Hierarchy) Version() Version { panic("todo") }

// Name is a name for messages: "memory", "cpu,cpuacct", "name=systemd", "unified".
func (h *Hierarchy) Name() string          { panic("todo") }
func (h *Hierarchy) Controllers() []string { panic("todo") }
func (h *Hierarchy) Has(ctrl string) bool  { panic("todo") }
func (h *Hierarchy) Named() bool           { panic("todo") } // a v1 hierarchy with a name and no controller

// TasksFile is the file into which a single task (v1) or a process (v2) is written: "tasks", "cgroup.procs".
func (h *Hierarchy) TasksFile() string { panic("todo") }

// FileName returns the name that a file has here: on v2 "tasks" is "cgroup.procs".
func (h *Hierarchy) FileName(name string) string { panic("todo") }

// DelegationFiles are those that Chown gives away with the directory.
func (h *Hierarchy) DelegationFiles() []string { panic("todo") }

// Open opens the directory at path, from the hierarchy's root: "/", "/a/b".
func (h *Hierarchy) Open(path string) (*Dir, error) { panic("todo") }

// ProcCgroup is the content of a /proc/PID/cgroup.
type ProcCgroup []byte

// Path returns the path in h, as the kernel gave it: " (deleted)" is never cut off.
// false: no line for h, or the cgroup is outside the daemon's cgroup namespace ("/..").
func (p ProcCgroup) Path(h *Hierarchy) (string, bool) { panic("todo") }

// Attr is the owner and mode (whole st_mode) of a directory or file, and its inode number.
type Attr struct {
	UID, GID, Mode uint32
	Ino            uint64
}

// Dir is a handle on a cgroup's directory. Not for concurrent Close.
type Dir struct{}

func (d *Dir) Path() string                  { panic("todo") } // as resolved, from the hierarchy's root
func (d *Dir) Hierarchy() *Hierarchy         { panic("todo") }
func (d *Dir) Open(rel string) (*Dir, error) { panic("todo") } // rel: "a", "a/b"; "" is a second handle on d
func (d *Dir) Attr() (Attr, error)           { panic("todo") }
func (d *Dir) Close() error                  { panic("todo") }

// Mkdir makes one child, owned with all its files by uid and gid, and opens it. EEXIST is an error.
// A new v1 cpuset gets its parent's cpus and mems.
func (d *Dir) Mkdir(name string, uid, gid uint32) (*Dir, error) { panic("todo") }
func (d *Dir) Rmdir(name string) error                          { panic("todo") }

// Children returns the names of child cgroups sorted; hidden counts those that are not UTF-8 or have control characters.
func (d *Dir) Children() (names []string, hidden int, err error) { panic("todo") }

// Files returns the names of the control files in readdir order.
func (d *Dir) Files() ([]string, error) { panic("todo") }

// Procs and Threads read cgroup.procs / tasks (v2: cgroup.threads). Numbers of the daemon's pid namespace, 0 for those it cannot see.
func (d *Dir) Procs() ([]int32, error)   { panic("todo") }
func (d *Dir) Threads() ([]int32, error) { panic("todo") }

// Populated reports whether a task is in the cgroup or below.
func (d *Dir) Populated() (bool, error) { panic("todo") }

// Enable enables v2 controllers for d's children, as far as the kernel lets.
func (d *Dir) Enable(ctrls ...string) error { panic("todo") }

// Marks are trusted.cgmanager.NAME xattrs.
func (d *Dir) Mark(name string) (string, bool, error) { panic("todo") }
func (d *Dir) SetMark(name, value string) error       { panic("todo") }
func (d *Dir) ClearMark(name string) error            { panic("todo") }
func (d *Dir) SetOwner(uid, gid uint32) error         { panic("todo") } // the directory alone; NoID (^0) leaves as is
func (d *Dir) SetMode(mode uint32) error              { panic("todo") }

// For says what a File handle is wanted for.
type For int

// The purposes: facts and ownership alone (O_PATH), reading, writing.
const (
	ForFacts For = iota
	ForRead
	ForWrite
)

// File opens a control file, for facts and the act that may follow on the same handle.
func (d *Dir) File(name string, what For) (*File, error) { panic("todo") }

// File is a handle on a control file: what is read or written is the file that was looked at.
type File struct{}

func (f *File) Name() string                   { panic("todo") }
func (f *File) Attr() (Attr, error)            { panic("todo") }
func (f *File) Read(limit int) ([]byte, error) { panic("todo") } // whole content; ErrTooBig beyond limit
func (f *File) Write(value string) error       { panic("todo") } // one write(2)
func (f *File) SetOwner(uid, gid uint32) error { panic("todo") }
func (f *File) SetMode(mode uint32) error      { panic("todo") }
func (f *File) Close() error                   { panic("todo") }

// ValidName checks a name of CGManager1 ("" and "a/b" are fine) and returns it.
func ValidName(name string) error { panic("todo") }

// ---- keys

// Write is one write to a control file.
type Write struct {
	Controller, File, Value string
	// LastResort: cannot be taken back (device rules, limits that reclaim or kill, state).
	Final bool
}

// Reader reads a control file of the cgroup in question, in the hierarchy of controller.
// It returns the version of that hierarchy too.
type Reader func(controller, file string) (string, error)

// Key is an abstract key of DESIGN 6.
type Key struct {
	Name     string
	ReadOnly bool
}

// FindKey finds an abstract key by name.
func FindKey(name string) (*Key, bool) { panic("todo") }
func Keys() []*Key                     { panic("todo") }

// Controller returns the controller whose hierarchy the key lives in on this host: memory.limit → memory;
// state → freezer on v1, "" on v2 (any v2 cgroup), blkio_weight → blkio or io.
func (s *Set) KeyHierarchy(k *Key) (*Hierarchy, string, error) { panic("todo") }

// Writes translates; Value reads.
func (k *Key) Writes(s *Set, value string, read Reader) ([]Write, error) { panic("todo") }
func (k *Key) Value(s *Set, read Reader) (string, error)                 { panic("todo") }

// ControllerOf returns the controller to which a kernel's control file belongs, "" for cgroup.* and the other core files.
func ControllerOf(file string) string { panic("todo") }

// Final reports whether a write to the kernel's file cannot be taken back.
func Final(file string) bool { panic("todo") }
