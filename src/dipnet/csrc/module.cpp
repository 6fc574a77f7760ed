// The Python module dipnet._native, put together from its parts.
#include "bind.h"

NB_MODULE(_native, m) {
  bind_cache(m);
  bind_engine(m);
  bind_reader(m);
  bind_rows(m);
  bind_select(m);
  bind_store(m);
}
