# Messages: getters and setters, the JSON, and reading back the changes of a plugin.
#
# A MessageCell represents a `mailerq.message.Message` during one event. The three texts are
# borrowed from the Python object until a setter replaces them. The JSON is made when a plugin first
# calls MQ_Json. The changes of a plugin are read back right after its turn, so that a mistake is
# reported for the right plugin. Only making the JSON and reading back take Python's lock.


cdef int borrow(Text *text, object value) except -1:
    # Borrow a str, bytes or memoryview; unset the text for other values. The caller guarantees a
    # NUL after the last byte of a memoryview.
    cdef Py_ssize_t size
    text.data = NULL
    text.size = 0
    text.copy = NULL
    text.lent = NULL
    text.object = NULL
    text.changed = False
    if isinstance(value, str):
        try:
            text.data = PyUnicode_AsUTF8AndSize(value, &size)
        except UnicodeEncodeError:
            value = value.encode("utf-8", "surrogateescape")
    if isinstance(value, bytes):
        text.data = PyBytes_AS_STRING(value)
        size = PyBytes_GET_SIZE(value)
    elif isinstance(value, memoryview):
        text.data = <const char *> PyMemoryView_GET_BUFFER(value).buf
        size = PyMemoryView_GET_BUFFER(value).len
    if text.data != NULL:
        text.size = size
        text.object = <void *> value
        Py_INCREF(value)
    return 0


cdef inline void own(Text *text) noexcept nogil:
    # Replace the memory of a Python object by a copy, because a plugin could write to it.
    if text.data == NULL or text.copy != NULL or text.lent != NULL:
        return
    text.lent = <char *> malloc(text.size + 1)
    if text.lent != NULL:
        memcpy(text.lent, text.data, text.size + 1)
        text.data = text.lent


cdef inline void drop(Text *text) noexcept:
    free(text.copy)
    free(text.lent)
    Py_XDECREF(<PyObject *> text.object)
    text.object = NULL


cdef MessageCell *open_message(EventCell *event, object message, object document) except NULL:
    cdef MessageCell *cell = <MessageCell *> take(event.worker, MESSAGE)
    if cell == NULL:
        raise MemoryError
    properties = message.properties
    cell.worker = event.worker
    cell.event = event
    cell.json = NULL
    cell.hidden = NULL
    cell.body = NULL
    cell.touched = False
    cell.local = event.number == ON_MESSAGE and message.local
    borrow(&cell.envelope, properties.get("envelope"))
    borrow(&cell.recipient, properties.get("recipient"))
    borrow(&cell.mime, message.body)
    cell.message = <void *> message
    cell.document = <void *> document
    Py_INCREF(message)
    Py_INCREF(document)
    return cell


cdef void close_message(MessageCell *cell) noexcept:
    drop(&cell.envelope)
    drop(&cell.recipient)
    drop(&cell.mime)
    if cell.json != NULL:
        json_object_put(cell.json)
    Py_DECREF(<object> cell.message)
    Py_DECREF(<object> cell.document)
    Py_XDECREF(<PyObject *> cell.hidden)
    Py_XDECREF(<PyObject *> cell.body)
    give(cell.worker, MESSAGE, &cell.cell)


# ---------------------------------------------------------------- functions for plugins


cdef MessageCell *message_here(const MQ_Message *message, const char *function) noexcept nogil:
    cdef uint64_t handle = <uint64_t> message
    cdef Block *block = block_of(handle, MESSAGE)
    cdef const char *problem = NULL
    if block == NULL or block.owner == NULL:
        problem = ": not a message"
    elif not at_home(block.owner):
        problem = " was called on another thread than the worker's"
    elif identity_of(cell_in(block, handle).word) != identity_of(handle):
        problem = ": the event of this message is over"
    if problem == NULL:
        return <MessageCell *> cell_in(block, handle)
    report(MQ_WARN, block.owner if block != NULL else NULL, plugin_of(handle),
           "%s%s; ignored", function, problem)
    return NULL


cdef inline bint is_alias(MessageCell *cell) noexcept nogil:
    # Whether the JSON exists, and the getters and setters are aliases of its properties.
    return cell.json != NULL and cell.event.number == ON_MESSAGE


cdef inline void touch(MessageCell *cell) noexcept nogil:
    # Have the message read back after the turn of this plugin.
    cell.touched = True
    cell.event.noted = True


cdef const char *get_text(MessageCell *cell, Text *text, const char *name) noexcept nogil:
    cdef json_object *value = NULL
    if not is_alias(cell):
        return text.data
    if (json_object_object_get_ex(cell.json, name, &value)
            and json_object_get_type(value) == json_type_string):
        return json_object_get_string(value)
    return NULL


cdef void set_text(MessageCell *cell, Text *text, const char *name, const char *data,
                   size_t size) noexcept nogil:
    cdef char *copy = NULL
    cdef json_object *value
    if size > INT_MAX:
        return
    touch(cell)
    if is_alias(cell):
        if data == NULL:
            json_object_object_del(cell.json, name)
        else:
            value = json_object_new_string_len(data, <int> size)
            if value != NULL:
                json_object_object_add(cell.json, name, value)
        return
    if data != NULL:
        copy = <char *> malloc(size + 1)
        if copy == NULL:
            return
        memcpy(copy, data, size)
        copy[size] = 0
    free(text.copy)
    text.copy = copy
    text.data = copy
    text.size = size if copy != NULL else 0
    text.changed = True


cdef MessageCell *settable(MQ_Message *message, const char *function, int last) noexcept nogil:
    # Return the message, or NULL if the current event is later than `last`.
    cdef MessageCell *cell = message_here(message, function)
    if cell == NULL or cell.event.number <= last:
        return cell
    report(MQ_WARN, cell.worker, plugin_of(<uint64_t> message), "%s in %s is too late; ignored",
           function, FUNCTIONS[cell.event.number])
    return NULL


cdef public const char *MQ_Envelope(MQ_Message *message) noexcept nogil:
    cdef MessageCell *cell = message_here(message, "MQ_Envelope")
    if cell == NULL:
        return NULL
    own(&cell.envelope)
    return get_text(cell, &cell.envelope, "envelope")


cdef public const char *MQ_Recipient(MQ_Message *message) noexcept nogil:
    cdef MessageCell *cell = message_here(message, "MQ_Recipient")
    if cell == NULL:
        return NULL
    own(&cell.recipient)
    return get_text(cell, &cell.recipient, "recipient")


cdef public const char *MQ_Mime(MQ_Message *message) noexcept nogil:
    cdef MessageCell *cell = message_here(message, "MQ_Mime")
    return get_text(cell, &cell.mime, "mime") if cell != NULL else NULL


cdef public size_t MQ_MimeSize(MQ_Message *message) noexcept nogil:
    cdef MessageCell *cell = message_here(message, "MQ_MimeSize")
    cdef json_object *value = NULL
    if cell == NULL:
        return 0
    if not is_alias(cell):
        return cell.mime.size if cell.mime.data != NULL else 0
    if (json_object_object_get_ex(cell.json, "mime", &value)
            and json_object_get_type(value) == json_type_string):
        return <size_t> json_object_get_string_len(value)
    return 0


cdef public void MQ_SetEnvelope(MQ_Message *message, const char *envelope,
                                size_t size) noexcept nogil:
    cdef MessageCell *cell = settable(message, "MQ_SetEnvelope", ON_MESSAGE)
    if cell != NULL:
        set_text(cell, &cell.envelope, "envelope", envelope, size)


cdef public void MQ_SetRecipient(MQ_Message *message, const char *recipient,
                                 size_t size) noexcept nogil:
    cdef MessageCell *cell = settable(message, "MQ_SetRecipient", ON_MESSAGE)
    if cell != NULL:
        set_text(cell, &cell.recipient, "recipient", recipient, size)


cdef public void MQ_SetMime(MQ_Message *message, const char *mime, size_t size) noexcept nogil:
    cdef MessageCell *cell = settable(message, "MQ_SetMime", OUT_DATA)
    if cell != NULL:
        set_text(cell, &cell.mime, "mime", mime, size)


cdef public c_bool MQ_Local(MQ_Message *message) noexcept nogil:
    cdef MessageCell *cell = message_here(message, "MQ_Local")
    return cell != NULL and cell.local


cdef public void MQ_SetLocal(MQ_Message *message, c_bool local) noexcept nogil:
    cdef MessageCell *cell = message_here(message, "MQ_SetLocal")
    if cell != NULL and cell.event.number == ON_MESSAGE:
        cell.local = local
        touch(cell)


cdef public json_object *MQ_Json(MQ_Message *message) noexcept nogil:
    cdef MessageCell *cell = message_here(message, "MQ_Json")
    if cell == NULL:
        return NULL
    if cell.json == NULL:
        cell.json = make_json(cell)
    touch(cell)
    return cell.json


# ---------------------------------------------------------------- json-c


class Unrepresentable(Exception):
    """A value that json-c or JSON cannot represent."""


cdef json_object *make_json(MessageCell *cell) noexcept with gil:
    # Make the document for plugins. Properties that json-c cannot hold are left out, and put back
    # when the document is read.
    cdef json_object *root = json_object_new_object()
    cdef Text stored
    if root == NULL:
        return NULL
    memset(&stored, 0, sizeof(Text))
    try:
        document = <object> cell.document
        hidden = {}
        for name, value in document.properties.items():
            try:
                put(root, name, value, 0)
            except (Unrepresentable, UnicodeEncodeError, TypeError, OverflowError):
                hidden[name] = value
        borrow(&stored, document.body)
        if cell.event.number == ON_MESSAGE:
            # From here on the JSON holds the values of the setters.
            put_text(root, "envelope", &cell.envelope)
            put_text(root, "recipient", &cell.recipient)
            put_text(root, "mime", &cell.mime)
        else:
            put_text(root, "mime", &stored)
        if hidden:
            keep(&cell.hidden, hidden)
        keep(&cell.body, document.body)
    except Exception:
        logger.exception("the JSON of a message could not be made")
        json_object_put(root)
        root = NULL
    drop(&stored)
    return root


cdef void keep(void **place, object value) noexcept:
    cdef PyObject *former = <PyObject *> place[0]
    Py_INCREF(value)
    place[0] = <void *> value
    Py_XDECREF(former)


cdef int put_text(json_object *root, const char *name, Text *text) except -1:
    if text.data != NULL:
        add_property(root, name, json_object_new_string_len(text.data, <int> text.size))
    elif text.changed:
        json_object_object_del(root, name)
    text.changed = False
    return 0


cdef int put(json_object *root, object name, object value, int depth) except -1:
    cdef Py_ssize_t size
    cdef const char *key = PyUnicode_AsUTF8AndSize(name, &size)
    if <Py_ssize_t> strlen(key) != size:
        raise Unrepresentable("has a NUL in its name")
    if value is None:
        json_object_object_add(root, key, NULL)
    else:
        add_property(root, key, to_json(value, depth))
    return 0


cdef int add_property(json_object *root, const char *name, json_object *value) except -1:
    # Steals the reference of the value.
    if value == NULL or json_object_object_add(root, name, value) != 0:
        json_object_put(value)
        raise MemoryError
    return 0


cdef json_object *to_json(object value, int depth) except? NULL:
    # Return a new reference. NULL without an exception is the null of JSON.
    cdef json_object *result = NULL
    cdef Py_ssize_t size
    cdef const char *text
    if value is None:
        return NULL
    if depth > DEPTH_LIMIT:
        raise Unrepresentable("is nested too deeply")
    if isinstance(value, str):
        text = PyUnicode_AsUTF8AndSize(value, &size)
        result = json_object_new_string_len(text, <int> size)
    elif isinstance(value, bool):
        result = json_object_new_boolean(value)
    elif isinstance(value, int):
        if -0x8000000000000000 <= value <= 0x7fffffffffffffff:
            result = json_object_new_int64(value)
        elif 0 < value <= 0xffffffffffffffff:
            result = json_object_new_uint64(value)
        else:
            # json-c keeps the digits beside the approximation, as after parsing.
            digits = b"%d" % value
            result = json_object_new_double_s(float(value), digits)
    elif isinstance(value, float):
        result = json_object_new_double(value)
    elif isinstance(value, dict):
        result = json_object_new_object()
    elif isinstance(value, list):
        result = json_object_new_array()
    else:
        raise Unrepresentable(f"is a {type(value).__name__}")
    if result == NULL:
        raise MemoryError
    try:
        if isinstance(value, dict):
            for name, item in value.items():
                put(result, name, item, depth + 1)
        elif isinstance(value, list):
            for item in value:
                if json_object_array_add(result, to_json(item, depth + 1)) != 0:
                    raise MemoryError
    except BaseException:
        json_object_put(result)
        raise
    return result


cdef object from_json(json_object *value, int depth):
    cdef json_type kind = json_object_get_type(value)
    cdef lh_entry *entry
    cdef size_t index
    if kind == json_type_null:
        return None
    if depth > DEPTH_LIMIT:
        raise Unrepresentable("is nested too deeply")
    if kind == json_type_string:
        try:
            return PyUnicode_DecodeUTF8(
                json_object_get_string(value), json_object_get_string_len(value), NULL)
        except UnicodeDecodeError:
            raise Unrepresentable("is not UTF-8") from None
    if kind == json_type_boolean:
        return json_object_get_boolean(value) != 0
    if kind == json_type_int:
        if json_object_get_int64(value) < 0:
            return json_object_get_int64(value)
        return json_object_get_uint64(value)
    if kind == json_type_double:
        # Use the text that json-c would print: the value may be an integer of any size.
        text = json_object_to_json_string(value).decode()
        try:
            return int(text)
        except ValueError:
            pass
        number = float(text)
        if number - number != 0:
            raise Unrepresentable("is not a finite number")
        return number
    if kind == json_type_array:
        return [from_json(json_object_array_get_idx(value, index), depth + 1)
                for index in range(json_object_array_length(value))]
    result = {}
    entry = json_object_get_object(value).head
    while entry != NULL:
        name = (<char *> lh_entry_k(entry)).decode("utf-8", "replace")
        result[name] = from_json(<json_object *> lh_entry_v(entry), depth + 1)
        entry = entry.next
    return result


cdef bint read_back(EventCell *event, int plugin) noexcept with gil:
    # Apply the changes of the plugin. If a property cannot be used, log that and return False.
    cdef MessageCell *cell = event.message
    cell.touched = False
    try:
        problem = take_json(cell) if cell.json != NULL else None
        if problem is None:
            problem = take_texts(cell)
    except Exception as error:
        problem = f"could not be read back: {error!r}"
    if problem is None:
        return True
    text = f"{problem}; set in {FUNCTIONS[event.number].decode()}".encode()
    append_line(MQ_WARN, name_of(event.worker, plugin), text)
    return False


cdef object take_json(MessageCell *cell):
    # Apply the properties and the body of the JSON. Return what is wrong, or None.
    cdef lh_entry *entry = json_object_get_object(cell.json).head
    cdef json_object *value
    document = <object> cell.document
    body = None
    properties = dict(<object> cell.hidden) if cell.hidden != NULL else {}
    while entry != NULL:
        name = (<char *> lh_entry_k(entry)).decode("utf-8", "replace")
        value = <json_object *> lh_entry_v(entry)
        if name == "mime" and json_object_get_type(value) == json_type_string:
            body = (<char *> json_object_get_string(value))[:json_object_get_string_len(value)]
        else:
            try:
                properties[name] = from_json(value, 0)
            except Unrepresentable as error:
                return f"property {name}: {error}"
        entry = entry.next
    problem = type(document)(properties).problem()
    if problem is not None:
        return problem
    for name in ("envelope", "recipient"):
        address = properties.get(name)
        if address != document.properties.get(name) and (problem := address_problem(name, address)):
            return problem
    document.properties = properties
    if body != <object> cell.body:
        keep(&cell.body, body)
        document.body = body
        if cell.event.number == OUT_DATA and cell.mime.data == NULL:
            borrow(&cell.mime, body)
            cell.mime.changed = True
    return None


cdef object take_texts(MessageCell *cell):
    # Apply the values of the setters. Return what is wrong, or None.
    message = <object> cell.message
    if cell.event.number == ON_MESSAGE:
        message.local = cell.local
    for name in ("envelope", "recipient"):
        text = &cell.envelope if name == "envelope" else &cell.recipient
        if not text.changed:
            continue
        text.changed = False
        if text.data == NULL:
            message.properties.pop(name, None)
            continue
        try:
            value = PyUnicode_DecodeUTF8(text.data, text.size, NULL)
        except UnicodeDecodeError:
            return f"property {name}: is not UTF-8"
        if problem := address_problem(name, value):
            return problem
        message.properties[name] = value
    if cell.mime.changed:
        cell.mime.changed = False
        message.body = None if cell.mime.data == NULL else cell.mime.data[:cell.mime.size]
    if cell.event.number == ON_MESSAGE and not message.properties.get("recipient"):
        return "property recipient: is missing"
    return None


cdef object address_problem(str name, object address):
    # Return what is wrong with an address that a plugin has set, or None.
    if not address:  # the null sender; a missing recipient is detected elsewhere
        return None
    if UNPRINTABLE.search(address):
        # A control character could end the SMTP command that carries the address.
        return f"property {name}: holds a control character"
    try:
        parse_mailbox(address)
    except AddressError as error:
        return f"property {name}: {error}"
    return None
