package proxy

import (
	"fmt"
	"strconv"
	"strings"
)

// idRange says that size ids from inner on are, outside, those from outer on.
type idRange struct{ inner, outer, size uint32 }

// idMap is a uid_map or gid_map (user_namespaces(7)).
type idMap []idRange

// parseIDMap reads the text of a map.
func parseIDMap(text string) (idMap, error) {
	var m idMap
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return nil, fmt.Errorf("id map: %q: not three numbers", line)
		}
		var n [3]uint32
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("id map: %w", err)
			}
			n[i] = uint32(v)
		}
		m = append(m, idRange{n[0], n[1], n[2]})
	}
	return m, nil
}

// outer returns what the id is called outside.
func (m idMap) outer(inner uint32) (uint32, bool) {
	for _, r := range m {
		if inner >= r.inner && inner-r.inner < r.size {
			return r.outer + (inner - r.inner), true
		}
	}
	return 0, false
}
