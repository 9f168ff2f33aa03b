package cgfs

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
