package source

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// mapFile returns nil if the file cannot be mapped: it is empty, or too large
// for the address space, or its file system does not map.
func mapFile(file *os.File, size int64) []byte {
	if size == 0 || int64(int(size)) != size {
		return nil
	}
	mapped, err := unix.Mmap(int(file.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil
	}
	return mapped
}

func unmapFile(mapped []byte) {
	if mapped != nil {
		unix.Munmap(mapped)
	}
}

// extents finds the parts of a file that are not holes. Of a file system that
// does not tell, that is everything.
func extents(file *os.File, size int64) []extent {
	var data []extent
	for off := int64(0); off < size; {
		start, err := file.Seek(off, unix.SEEK_DATA)
		if pathErr, ok := err.(*os.PathError); ok && pathErr.Err == unix.ENXIO { // only a hole is left
			break
		}
		end := size
		if err == nil {
			end, err = file.Seek(start, unix.SEEK_HOLE)
		}
		if err != nil || end <= start {
			start, end = off, size
		}
		data = append(data, extent{start, min(end, size)})
		off = end
	}
	file.Seek(0, io.SeekStart)
	return data
}
