// Module tso_fast._C.
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ core of tso_fast; call it through tso_fast.scoring and tso_fast.logprob.";
    bindings::bind_logprob(m);
    bindings::bind_scoring(m);
    bindings::bind_selection(m);
}
